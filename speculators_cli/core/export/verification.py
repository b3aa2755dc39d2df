"""Verification: compare an exported folder with the contract and the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import EMBEDDING, TrainedDraft, read_draft
from speculators_cli.core.errors import ExportError
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.models.repo_files import CONFIG_NAME
from speculators_cli.core.reading import read_json_object

# A weight is rounded by at most half a unit in the last place: 2^-9, 2^-12 or 2^-24, relative. The
# bounds allow for a dozen matrices and norms in a row, over two steps.
MAX_ERROR = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-18}


@dataclass(frozen=True)
class Verification:
    """The result of a verification that passed."""

    logit_error: float  # root mean square of the difference, over that of the logits
    argmax_agreement: float  # fraction of positions with the same top-1 token


def verify(
    folder: Path, source: TrainedDraft, served: DraftConfig, *, target: str, dtype: torch.dtype
) -> Verification:
    """Check an exported folder.

    Args:
        folder: The export.
        source: The draft that was exported.
        served: The config of the source with the user's changes.
        target: The target of the export.
        dtype: The dtype of its weights.

    Raises:
        ExportError: The engine cannot serve it, or it differs from the source.
    """
    problems = find_problems(folder, target)
    if not problems:
        exported = read_draft(str(folder), _given(served), flag="--output-dir")
        problems = _find_differences(exported, source, served, dtype)
        content = read_json_object(folder / CONFIG_NAME)
        rope = TARGETS[target].find_rope_problem(content, source.config)
        problems += [] if rope is None else [rope]
    if not problems:
        result = _compare_logits(exported, source)
        if not result.logit_error <= MAX_ERROR[dtype]:
            problems = [
                f"its relative logit error is {result.logit_error:.1e}, expected at most "
                f"{MAX_ERROR[dtype]:.1e}"
            ]
    if problems:
        lines = [f"  {problem}" for problem in problems[:20]]
        raise ExportError(
            "\n".join(
                [f"The export of `{source.name}` failed verification and was removed", *lines]
            ),
            hint="Report this with the output of `speculators env`",
        )
    return result


def find_broken_values(source: TrainedDraft) -> list[str]:
    """Names of tensors that contain NaN or infinity."""
    tensors = dict(source.weights)
    if source.embedding is not None:
        tensors[EMBEDDING] = source.embedding
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def has_untrained_norms(weights: Mapping[str, Tensor]) -> bool:
    """Whether all norm weights still have their initial value, 1.0."""
    norms = [tensor for tensor in weights.values() if tensor.dim() == 1]
    return all(bool((norm == 1.0).all()) for norm in norms)


def _given(served: DraftConfig) -> Overrides:
    """The verifier, for formats without it in config.json."""
    return Overrides(
        verifier_name_or_path=served.verifier_name_or_path,
        verifier_architectures=served.verifier_architectures,
    )


def _find_differences(
    exported: TrainedDraft, source: TrainedDraft, served: DraftConfig, dtype: torch.dtype
) -> list[str]:
    # A format may write the same RoPE in another way, and have no number of draft tokens.
    config = replace(exported.config, rope_parameters=served.rope_parameters)
    if exported.kind != "speculators":
        config = config.with_num_draft_tokens(served.num_draft_tokens)
    found = [] if config == served else [f"its config reads {config}, expected {served}"]
    found += [
        f"`{name}` is not the checkpoint's, rounded to {dtype}"
        for name, tensor in source.weights.items()
        if not torch.equal(exported.weights[name], tensor.to(dtype))
    ]
    if not torch.equal(exported.vocab_map.kept_ids, source.vocab_map.kept_ids):
        found.append("its draft vocabulary is not the checkpoint's")
    if exported.embedding is not None and (
        source.embedding is None or not torch.equal(exported.embedding, source.embedding.to(dtype))
    ):
        found.append("its embedding is not the checkpoint's")
    return found


def _compare_logits(exported: TrainedDraft, source: TrainedDraft) -> Verification:
    """Compare logits of two steps over random tokens and hidden states, in float32."""
    embedding = source.embedding
    if embedding is None:
        shape = (source.config.vocab_size, source.config.hidden_size)
        embedding = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    # Of another number of draft tokens, if the user chose one.
    sized = source.config.with_num_draft_tokens(exported.config.num_draft_tokens)
    expected = replace(source, config=sized).compute_probe_logits(embedding)
    own = embedding if exported.embedding is None else exported.embedding
    found = exported.compute_probe_logits(own)
    error = (found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return Verification(float(error), float(agreement))

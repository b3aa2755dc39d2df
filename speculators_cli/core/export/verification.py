"""Verification: a written folder against the contract, the checkpoint and the verifier."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import TrainedDraft, read_draft
from speculators_cli.core.errors import ExportError
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.models.repo_files import CONFIG_NAME
from speculators_cli.core.reading import read_json_object

# A weight is rounded by at most half of its last bit: 2^-9, 2^-12 and 2^-24 of itself. The bounds
# leave room for the dozen matrices and norms in a row, through two steps.
MAX_ERROR = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-18}


@dataclass(frozen=True)
class Verification:
    """What was found of a folder that can be served."""

    logit_error: float  # root mean square of the difference, over that of the logits
    argmax_agreement: float  # share of positions with the same best token


def verify(
    folder: Path, source: TrainedDraft, served: DraftConfig, *, target: str, dtype: torch.dtype
) -> Verification:
    """Check an exported folder.

    Args:
        folder: What was written.
        source: What it was written from.
        served: The source's config with what the user changed.
        target: The format of the folder.
        dtype: Of its weights.

    Raises:
        ExportError: An engine could not serve it, or it is not the draft of the source.
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
                f"its logits are off by {result.logit_error:.1e} of their size, expected at most "
                f"{MAX_ERROR[dtype]:.1e}"
            ]
    if problems:
        lines = [f"  {problem}" for problem in problems[:20]]
        raise ExportError(
            "\n".join([f"The export of `{source.name}` is wrong; nothing was kept", *lines]),
            hint="Report this with the output of `speculators env`",
        )
    return result


def find_broken_values(source: TrainedDraft) -> list[str]:
    """Names of tensors with values that are not finite."""
    tensors = dict(source.weights)
    if source.embedding is not None:
        tensors["embed_tokens.weight"] = source.embedding
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def has_untrained_gains(weights: Mapping[str, Tensor]) -> bool:
    """Whether all norm gains are exactly what they started as, 1.0."""
    gains = [tensor for tensor in weights.values() if tensor.dim() == 1]
    return all(bool((gain == 1.0).all()) for gain in gains)


def _given(served: DraftConfig) -> Overrides:
    """What a plain folder does not say of its verifier."""
    return Overrides(
        verifier_name_or_path=served.verifier_name_or_path,
        verifier_architectures=served.verifier_architectures,
    )


def _find_differences(
    exported: TrainedDraft, source: TrainedDraft, served: DraftConfig, dtype: torch.dtype
) -> list[str]:
    # A plain config does not say how many tokens to draft.
    # A format may spell the same RoPE in another way.
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
    """Logits of two steps over random tokens and hidden states, both in float32."""
    embedding = source.embedding
    if embedding is None:
        shape = (source.config.vocab_size, source.config.hidden_size)
        embedding = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = source.compute_probe_logits(embedding)
    own = embedding if exported.embedding is None else exported.embedding
    found = exported.compute_probe_logits(own)
    error = (found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return Verification(float(error), float(agreement))

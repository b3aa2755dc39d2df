"""Drafts over a verifier given by its tensors; by default tiny, with dimensions that all differ."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.peagle.training import PEagleTraining
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.kernels.spans import Spans
from speculators_cli.core.models.losses import LOSSES
from speculators_cli.core.models.verifier import FrozenVerifier, VerifierConfig

# Kernels to compute with; Triton is made for Linux alone.
KERNELS = [
    "plain",
    pytest.param(
        "fast", marks=pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
    ),
]


# Multiples of 16, as the products in float8 need them.
WIDE: dict[str, Any] = {
    "hidden_size": 48, "target_hidden_size": 48, "intermediate_size": 80, "num_heads": 6,
    "num_kv_heads": 2, "head_dim": 8, "draft_vocab_size": 32, "vocab_size": 64,
}  # fmt: skip

EAGLES: dict[str, type[Eagle3Training]] = {"eagle3": Eagle3Training, "peagle": PEagleTraining}


def make_config(**changes: Any) -> Eagle3Config:
    """An `Eagle3Config` of hidden size 24; any field can be given."""
    fields: dict[str, Any] = {
        "arch": "llama",
        "hidden_size": 24,
        "target_hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 1,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 512,
        "vocab_size": 37,
        "draft_vocab_size": 19,
        "target_layer_ids": (2, 4, 7),
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "ttt_steps": 3,
        "verifier_name_or_path": "example/verifier",
        "verifier_architectures": ("LlamaForCausalLM",),
    }
    return Eagle3Config(**(fields | changes))


def shaped_config(shape: str, **changes: Any) -> Eagle3Config:
    """An `Eagle3Config` for a predefined shape of a verifier, as `bench` measures it."""
    verifier, vocab_size = SHAPES[shape]
    sizes = {
        "hidden_size": verifier.hidden_size,
        "target_hidden_size": verifier.hidden_size,
        "intermediate_size": verifier.intermediate_size,
        "num_heads": verifier.num_heads,
        "num_kv_heads": verifier.num_kv_heads,
        "head_dim": verifier.head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": 32000,
    }
    return make_config(**(sizes | changes))


def write_draft(folder: Path, config: Eagle3Config | DFlashConfig, **changes: Any) -> Path:
    """A random draft of this shape in `folder`, as this package exports it.

    `changes` go to the decoder layers' part of its config.json.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: float(len(shape) == 1) + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in config.tensor_shapes().items()
    }
    kept_ids = torch.randperm(config.vocab_size, generator=generator)
    kept_ids = kept_ids[: config.draft_vocab_size].sort().values
    tensors["d2t"] = kept_ids - torch.arange(len(kept_ids))
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, kept_ids, True)
    content = config.to_json()
    content["transformer_layer_config"] |= changes
    return write_folder(folder, content, tensors)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json of a draft, and its tensors."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content, load_file(folder / "model.safetensors")


def write_folder(folder: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write the config.json of a draft, and its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_draft(
    config: Eagle3Config,
    *,
    embedding: Tensor,
    head: Tensor,
    norm_weight: Tensor | None,
    kept_ids: Tensor,
    loss_decay: float,
) -> Eagle3Training:
    """A draft in training over given verifier tensors; its weights are not filled."""
    gain = torch.ones(config.hidden_size) if norm_weight is None else norm_weight
    verifier_config = VerifierConfig(
        name_or_path=config.verifier_name_or_path,
        architectures=config.verifier_architectures,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=9,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters,
        max_position_embeddings=config.max_position_embeddings,
        norm_offset=0.0,
        is_tied=False,
        logit_softcap=None,
        logit_scale=1.0,
    )
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, kept_ids, True)
    return EAGLES[config.algorithm](
        config,
        FrozenVerifier(embedding, gain, head, verifier_config),
        VocabMap(kept_ids - torch.arange(len(kept_ids)), t2d),
        loss=LOSSES["kl"],
        loss_decay=loss_decay,
        train_head=True,
    )


def filled_draft(
    config: Eagle3Config, rng: torch.Generator, *, kept_ids: Tensor, loss_decay: float = 0.7
) -> Eagle3Training:
    """A draft with every weight random, so that no gain is one and no path is silent."""
    shape = (config.vocab_size, config.hidden_size)
    # Logits of a spread near one, whatever the width.
    draft = make_draft(
        config,
        embedding=torch.randn(shape, generator=rng),
        head=torch.randn(shape, generator=rng) * (24 / config.hidden_size) ** 0.5,
        norm_weight=1 + 0.3 * torch.randn(config.hidden_size, generator=rng),
        kept_ids=kept_ids,
        loss_decay=loss_decay,
    )
    fill_weights(draft, rng, std=0.15 * (24 / config.hidden_size) ** 0.5)
    return draft


def fill_weights(draft: nn.Module, rng: torch.Generator, *, std: float = 0.15) -> None:
    """Make norm weights random around one, and matrices around zero."""
    with torch.no_grad():
        for parameter in draft.parameters():
            own = (1.0, 0.3) if parameter.dim() == 1 else (0.0, std)
            parameter.normal_(*own, generator=rng)


def make_sample(
    num_tokens: int,
    config: DraftConfig,
    rng: torch.Generator,
    *,
    supervised_fraction: float = 0.7,
) -> Sample:
    """A sample of random states; each token is supervised by chance."""
    size = config.hidden_size
    return Sample(
        input_ids=torch.randint(config.vocab_size, (num_tokens,), generator=rng),
        loss_mask=torch.rand(num_tokens, generator=rng) < supervised_fraction,
        aux_hidden_states=tuple(
            torch.randn(config.num_aux_layers, num_tokens, size, generator=rng)
        ),
        last_hidden_states=torch.randn(num_tokens, size, generator=rng),
        is_normed=False,
    )


def pack(*samples: Sample, total_seq_len: int = 32) -> Batch:
    """Samples end to end, in float32."""
    return collate(
        range(len(samples)),
        samples,
        total_seq_len=total_seq_len,
        num_aux_layers=len(samples[0].aux_hidden_states),
        hidden_size=samples[0].last_hidden_states.shape[-1],
        dtype=torch.float32,
    )


def lay_out(
    x: Tensor,  # [active, ...]
    spans: Spans,
) -> Tensor:
    """Each row where the spans place it, zeros in the gaps; [queries, ...]."""
    if spans.sources is None:
        return x
    return torch.cat([x, torch.zeros_like(x[:1])])[spans.sources]


def attend_from(
    rows: Tensor,
    spans: Spans,
    query: Tensor,
    *keys_and_values: Tensor,
    window: int | None = None,
) -> Tensor:
    """`joint_attention` from some rows; the rest is given as `plain_attention` takes it."""
    # Triton is made for Linux alone.
    from speculators_cli.core.kernels.joint_attention import joint_attention

    num_steps = len(keys_and_values) // 2
    parts = (keys_and_values[:num_steps], keys_and_values[num_steps:])
    keys, values = ([first, *(x[rows] for x in later)] for first, *later in parts)
    return joint_attention(lay_out(query[rows], spans), keys, values, spans, window=window)

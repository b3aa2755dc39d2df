"""The DFlash and DSpark drafts of vllm-project/speculators 0.9, for `rivals.py`."""

from pathlib import Path
from typing import Any

import torch

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.dspark.config import DSparkConfig

# Of DSpark as published, and as this package computes it: L1 is twice the total variation.
DSPARK_LOSS = '{"ce": 0.1, "tv": 1.8}'


def build_blocks(
    config: DraftConfig,
    folder: Path,  # of the verifier
    layers: dict[str, Any],
    vocab_maps: tuple[torch.Tensor, torch.Tensor],
    device: torch.device,
) -> tuple[Any, dict[str, Any]]:
    """The draft, and what its forward takes but `max_anchors`: full attention, eager losses."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.models.dspark.config import DSparkSpeculatorConfig
    from speculators.models.dspark.core import DSparkDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import Qwen3Config

    assert isinstance(config, DFlashConfig)
    layers = {name: value for name, value in layers.items() if name != "mlp_bias"}
    shape = Qwen3Config(**layers)
    # Flex attention has no backward on a CPU.
    kernel = "simple_flex_attention" if device.type == "cuda" else "sdpa"
    shape._attn_implementation = kernel  # noqa: SLF001
    proposal = GreedyTokenProposalConfig(speculative_tokens=config.num_draft_tokens)
    fields: dict[str, Any] = {
        "transformer_layer_config": shape,
        "draft_vocab_size": config.draft_vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": list(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": isinstance(config, DSparkConfig),
        "speculators_config": SpeculatorsConfig(
            algorithm=config.algorithm,
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=str(folder), architectures=["LlamaForCausalLM"]),
        ),
    }
    with torch.device(device):
        if isinstance(config, DSparkConfig):
            fields |= {"markov_rank": config.markov_rank, "enable_confidence_head": True}
            model = DSparkDraftModel(DSparkSpeculatorConfig(**fields))
        else:
            model = DFlashDraftModel(DFlashSpeculatorConfig(**fields))
        t2d, d2t = vocab_maps
        model.load_vocab_mappings(t2d.to(device), d2t.to(device))
        model.load_verifier_weights()
    is_dspark = isinstance(config, DSparkConfig)
    arguments = {
        "loss_config": resolve_loss_config(DSPARK_LOSS if is_dspark else "kl_div", "eager"),
    }
    if is_dspark:
        arguments["tv_loss_fn"] = resolve_loss_config("tv", "eager")["tv"][0]
    return model, arguments

"""Write `docs/reference/verifiers.md`: which families of verifiers can be trained for.

Run `python docs/write_verifier_table.py` after an update of transformers; a slow test compares. It
takes some minutes and a few GB of memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from speculators_cli.core.models.family import Family
from speculators_cli.core.models.family_code import read_family
from speculators_cli.core.models.readout import Readout
from speculators_cli.core.models.readout_measurement import UnsupportedReadoutError, measure_readout

PAGE = Path(__file__).parent / "reference" / "verifiers.md"
HEAD = """# Verifiers

Training needs three parts of a verifier: its embedding, its final norm and its LM head. How they
make logits is measured each time on the family's own code in transformers, so scale, soft cap, eps,
biases and the kind of norm are those of the family, whatever its config calls them. Only `llama`,
`mistral`, `qwen2` and `qwen3` are read from a config.json that says all of it, which saves
importing transformers; a test compares them. A verifier with code of its own is measured the same
way with `--trust-remote-code`. What cannot be reproduced is refused with the reason.

| Embedding and LM head stored as | Read |
| --- | --- |
| bfloat16, float16, float32 | as they are |
| FP8 or int8 with one scale, one per row (`weight_scale`), or one per block of 128 x 128 \
(`weight_scale_inv`) | dequantised |
| NVFP4 of compressed-tensors or ModelOpt | dequantised |
| GPTQ, AWQ, bitsandbytes, MXFP4, packed integers | not supported: pass the unquantised \
verifier |

Other layers may be quantised in any way; most quantised models keep these two as they were. Where
`tie_word_embeddings` is set and the files hold another `lm_head.weight`, the embedding is used, as
in serving engines, with a warning.

The families of transformers {version}, each with its default config: {trained} of {all} are
trained.
Soft cap and scale are those of that config. Of a vision-language model the text part is used.

| Family (`model_type`) | Trained | Final norm and logits, or why not |
| --- | --- | --- |
"""


def families() -> Iterator[Family]:
    """Every causal and image-text family, with its default config."""
    for kind in sorted(
        {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    ):
        try:
            content: dict[str, Any] = CONFIG_MAPPING[kind]().to_dict()
        except Exception:  # noqa: BLE001 - a family whose config has no defaults
            content = {}
        content = json.loads(json.dumps(content, default=str)) | {"model_type": kind}
        yield read_family(kind, content, trust_remote_code=False)


def describe(readout: Readout) -> str:
    """What a readout computes, in a cell of the table."""
    norm = "LayerNorm" if readout.is_centred else "RMSNorm"
    parts = [norm]
    if readout.norm is None:
        parts.append("without weights")
    if readout.offset:
        parts.append("weights stored as `w - 1`")
    if readout.scale != 1.0:
        parts.append(f"logits scaled by {readout.scale:.4g}")
    if readout.softcap is not None:
        parts.append(f"soft cap {readout.softcap:g}")
    return ", ".join(parts)


def row(family: Family) -> tuple[bool, str]:
    """Whether a family is trained, and its row of the table."""
    try:
        return True, f"| `{family.name}` | yes | {describe(measure_readout(family))} |"
    except UnsupportedReadoutError as error:
        reason = str(error).replace("|", "\\|")
        return False, f"| `{family.name}` | no | {reason} |"


def page() -> str:
    """The whole page."""
    rows = [row(family) for family in families()]
    trained = sum(is_trained for is_trained, _ in rows)
    head = HEAD.format(version=transformers.__version__, trained=trained, all=len(rows))
    return head + "".join(f"{text}\n" for _, text in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")

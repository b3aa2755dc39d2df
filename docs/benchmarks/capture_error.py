"""Measure how far hidden states in bfloat16 and float8 are from float32, for a verifier.

    python docs/benchmarks/capture_error.py smollm2 --prompts held-out.jsonl --num-prompts 32

Prompts are rendered with the verifier's chat template. Prints one line of JSON for each way to
compute: the median relative error of each captured layer over all tokens, how often the LM head
over the last states names the same token as in float32, and their mean KL divergence.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from speculators_cli.core.engines.comparison import median_error
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine, load_model


def render(verifier: str, prompts: Path, num_prompts: int) -> Packed:
    """The first prompts of a file, each a document."""
    tokenizer = AutoTokenizer.from_pretrained(verifier)
    documents = []
    for line in prompts.read_text("utf-8").splitlines()[:num_prompts]:
        message = {"role": "user", "content": json.loads(line)["prompt"]}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        documents.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = torch.tensor([token for document in documents for token in document])
    return Packed(ids, [len(x) for x in documents], torch.arange(len(ids)))


def capture(
    given: argparse.Namespace, packed: Packed, dtype: torch.dtype, *, is_float8: bool
) -> tuple[CapturedStates, Tensor]:
    """Hidden states, and the log-probabilities that the LM head makes of the last."""
    device = torch.device(given.device)
    model = load_model(given.verifier, dtype=dtype, device=device)
    n = model.config.num_hidden_layers
    layer_ids = (2, n // 2, n - 3)
    engine = TransformersEngine(
        model,
        layer_ids,
        end_ids=frozenset(),
        name=given.verifier,
        is_compiled=False,
        is_float8=is_float8,
    )
    with torch.no_grad():
        states = engine.capture(packed)
        normed = engine.parts.decoder.norm(states.last)
        logits = model.get_output_embeddings()(normed).float()
    return (
        CapturedStates(states.aux.float().cpu(), states.last.float().cpu()),
        logits.log_softmax(-1).cpu(),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verifier", help="folder or hub id")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    packed = render(given.verifier, given.prompts, given.num_prompts)
    exact, expected = capture(given, packed, torch.float32, is_float8=False)
    hidden = exact.last.shape[1]
    for name, dtype, is_float8 in (
        ("bfloat16", torch.bfloat16, False),
        ("float8", torch.bfloat16, True),
    ):
        found, logs = capture(given, packed, dtype, is_float8=is_float8)
        layers = zip(found.aux.split(hidden, -1), exact.aux.split(hidden, -1), strict=True)
        line = {
            "compute_dtype": name,
            "num_tokens": len(packed.input_ids),
            "aux_errors": [median_error(a, b) for a, b in layers],
            "last_error": median_error(found.last, exact.last),
            "same_token": (logs.argmax(-1) == expected.argmax(-1)).float().mean().item(),
            "kl": (expected.exp() * (expected - logs)).sum(-1).mean().item(),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()

"""Train the embedded verifier: `python -m speculators_cli.core.demo.make_verifier OUTPUT_DIR`.

The corpus is every function of Python's standard library, tests included, of up to 3,000
characters: a document is one function, dedented, between the begin and the end token. Files whose
path hashes to 0 modulo 20 are held out, except for functions whose head (signature and docstring)
also occurs elsewhere. Prompts are first halves of held-out functions. Seeded; two machines agree up
to rounding.
"""

import argparse
import ast
import json
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"
VOCAB_SIZE = 2048
MAX_FUNCTION_CHARACTERS = 3000
HELD_OUT_MODULUS = 20
NUM_PROMPTS = 1024
PROMPT_TOKENS = (16, 96)  # minimum and maximum
WINDOW = 256  # tokens
BATCH = 128  # windows per optimizer step
PEAK_LR, WEIGHT_DECAY = 4e-3, 0.1

Function = tuple[str, str]  # head: signature and docstring; body


def read_functions(corpus: Path) -> tuple[list[Function], list[Function]]:
    """Read all training functions and held-out functions; sorted by path and position."""
    training: list[Function] = []
    held_out: list[Function] = []
    for file in sorted(corpus.rglob("*.py")):
        name = file.relative_to(corpus).as_posix()
        if "-packages/" in name or "lib2to3/tests/data" in name:
            continue
        try:
            text = file.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes: errors in some filters
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        is_held_out = int(sha256(name.encode()).hexdigest(), 16) % HELD_OUT_MODULUS == 0
        (held_out if is_held_out else training).extend(functions_of(text, tree))
    # Stripped, as prompts are.
    heads = {head.rstrip() for head, _ in training}
    return training, [(head, body) for head, body in held_out if head.rstrip() not in heads]


def functions_of(text: str, tree: ast.Module) -> Iterator[Function]:
    """Yield the functions of a file, split after signature and docstring."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 1:
            continue
        has_docstring = ast.get_docstring(node) is not None
        if has_docstring and len(node.body) < 2:
            continue
        first = node.body[1 if has_docstring else 0]
        first_line = min([first.lineno, *(x.lineno for x in getattr(first, "decorator_list", []))])
        source = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        num_head_lines = first_line - node.lineno
        if num_head_lines < 1 or len(source) > MAX_FUNCTION_CHARACTERS:
            continue
        dedented = source.splitlines(keepends=True)
        yield "".join(dedented[:num_head_lines]), "".join(dedented[num_head_lines:]).rstrip() + "\n"


def train_tokenizer(functions: list[Function]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `VOCAB_SIZE` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((head + body for head, body in functions), trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END
    )


def encode(tokenizer: PreTrainedTokenizerFast, functions: list[Function]) -> Tensor:
    """Encode the functions in a random order, end to end; [tokens], int16."""
    texts = [f"{BEGIN}{head}{body}{END}" for head, body in functions]
    random.Random(0).shuffle(texts)  # noqa: S311 - an order, not a secret
    ids = [i for batch in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in batch]
    return torch.tensor(ids, dtype=torch.int16)


def build_model() -> LlamaForCausalLM:
    """Build a Llama with 1.8 million random parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def train_model(model: LlamaForCausalLM, ids: Tensor, num_steps: int) -> None:
    """Train on random windows with AdamW and a cosine schedule, in bfloat16 on a GPU."""
    device = model.device
    ids = ids.to(device)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )
    warmup = min(200, num_steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps - warmup, 1)),
        ],
        [warmup],
    )
    for step in range(num_steps):
        starts = torch.randint(len(ids) - WINDOW - 1, (BATCH, 1), generator=generator)
        windows = ids[(starts + torch.arange(WINDOW + 1)).to(device)].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(windows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)  # noqa: T201


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Return the mean loss over windows of the held-out functions, in nats per token."""
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).long().to(model.device)
    total = 0.0
    for part in windows.split(64):
        logits = model(part[:, :-1]).logits.float()
        total += F.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return total / (len(windows) * (WINDOW - 1))


def choose_prompts(tokenizer: PreTrainedTokenizerFast, functions: list[Function]) -> list[str]:
    """Return held-out functions up to the middle of their body, in a random order."""
    halves = set()
    for head, body in functions:
        lines = body.splitlines(keepends=True)
        # Without the line break: the tokenizer merges it with the following indentation.
        half = (head + "".join(lines[: len(lines) // 2])).rstrip()
        fewest, most = PROMPT_TOKENS
        num_tokens = len(tokenizer(half, add_special_tokens=False)["input_ids"])
        if len(lines) > 1 and fewest <= num_tokens <= most:
            halves.add(half)
    prompts = sorted(halves)
    random.Random(0).shuffle(prompts)  # noqa: S311 - an order, not a secret
    return prompts[:NUM_PROMPTS]


def main() -> None:
    """Train tokenizer and model, and write them with the prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--corpus", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--steps", type=int, default=8000)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, held_out = read_functions(arguments.corpus)
    tokenizer = train_tokenizer(training)
    train_ids, held_out_ids = encode(tokenizer, training), encode(tokenizer, held_out)
    model: Any = build_model()
    model.to(device)
    print(  # noqa: T201
        f"{len(training):,} functions, {len(train_ids):,} tokens; held out {len(held_out):,}, "
        f"{len(held_out_ids):,}; {model.num_parameters():,} parameters"
    )
    train_model(model, train_ids, arguments.steps)
    model = model.bfloat16()
    loss = held_out_loss(model, held_out_ids)
    print(f"held-out loss {loss:.3f} nats per token")  # noqa: T201
    verifier_dir = arguments.output_dir / "verifier"
    model.save_pretrained(verifier_dir)
    tokenizer.save_pretrained(verifier_dir)
    prompts = choose_prompts(tokenizer, held_out)
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (arguments.output_dir / "prompts.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()

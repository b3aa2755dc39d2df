"""Draft and verify once more, from files alone: no caches, every pass over the whole sequence.

The draft is EAGLE-3 written out here from its checkpoint's config.json and tensors, in float64; the
verifier is transformers' own, asked for its own hidden states. Nothing of the package is used.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Counts:
    """What one answer took."""

    tokens: tuple[int, ...]
    num_accepted: tuple[int, ...]  # in each pass


class CacheFreeDraft:
    """The draft of a checkpoint, one document at a time."""

    def __init__(self, checkpoint_dir: Path) -> None:
        self.config = json.loads((checkpoint_dir / "config.json").read_text())
        self.layers = self.config["transformer_layer_config"]
        tensors = load_file(checkpoint_dir / "model.safetensors")
        kept = torch.arange(self.config["draft_vocab_size"])
        self.verifier_ids = kept + tensors.pop("d2t") if "d2t" in tensors else kept
        self.weights = {name: x.double() for name, x in tensors.items() if name != "t2d"}

    def chain(self, tokens: Tensor, aux: list[Tensor], length: int) -> list[int]:
        """Draft tokens after `tokens`; `aux` are the states of all of them but the last."""
        features = self.fuse(aux)
        chain: list[int] = []
        for _ in range(length):
            embedded = self.weights["embed_tokens.weight"][
                torch.cat([tokens[1:], tokens.new_tensor(chain)])
            ]
            hidden = self.run(embedded, features)[-1:]
            normed = self.norm(hidden, "norm.weight")
            best = (normed @ self.weights["lm_head.weight"].T).argmax(-1)
            chain.append(int(self.verifier_ids[best]))
            features = torch.cat([features, normed if self.config["norm_output"] else hidden])
        return chain

    def fuse(self, aux: list[Tensor]) -> Tensor:
        parts = [x.double() for x in aux]
        if self.config["fc_norm"]:
            parts = [self.norm(x, f"fc_norm.{i}.weight") for i, x in enumerate(parts)]
        joined = torch.cat(parts, dim=-1)
        if self.config["norm_before_fc"]:
            joined = self.norm(joined, "input_norm.weight")
        return joined @ self.weights["fc.weight"].T

    def run(self, embedded: Tensor, features: Tensor) -> Tensor:
        hidden = features
        for index in range(self.layers["num_hidden_layers"]):
            name = f"layers.{index}."
            read = residual = hidden
            if index == 0:
                normed = self.norm(hidden, f"{name}hidden_norm.weight")
                read = torch.cat([self.norm(embedded, f"{name}input_layernorm.weight"), normed], -1)
                residual = normed if self.config["norm_before_residual"] else hidden
            else:
                read = self.norm(hidden, f"{name}input_layernorm.weight")
            hidden = residual + self.attend(read, f"{name}self_attn.")
            read = self.norm(hidden, f"{name}post_attention_layernorm.weight")
            gate, up, down = (
                self.weights[f"{name}mlp.{x}_proj.weight"] for x in ("gate", "up", "down")
            )
            hidden = hidden + (F.silu(read @ gate.T) * (read @ up.T)) @ down.T
        return hidden

    def attend(self, read: Tensor, name: str) -> Tensor:
        size = self.layers["head_dim"]
        q, k, v = (
            (read @ self.weights[f"{name}{x}_proj.weight"].T)
            .view(len(read), -1, size)
            .transpose(0, 1)
            for x in "qkv"
        )
        if f"{name}q_norm.weight" in self.weights:
            q, k = self.norm(q, f"{name}q_norm.weight"), self.norm(k, f"{name}k_norm.weight")
        groups = len(q) // len(k)
        q, k, v = (
            self.turn(q),
            self.turn(k).repeat_interleave(groups, 0),
            v.repeat_interleave(groups, 0),
        )
        scores = q @ k.transpose(-1, -2) / size**0.5
        future = torch.ones(len(read), len(read)).triu(1).bool()
        out = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        joined: Tensor = out.transpose(0, 1).reshape(len(read), -1)
        return joined @ self.weights[f"{name}o_proj.weight"].T

    def turn(self, x: Tensor) -> Tensor:
        """Plain RoPE, counted from 0: only distances matter."""
        half = x.shape[-1] // 2
        theta = self.layers["rope_parameters"]["rope_theta"]
        angles = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half).double() / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + self.layers["rms_norm_eps"]).rsqrt()
        normed: Tensor = x * scale * self.weights[name]
        return normed


@torch.no_grad()
def draft_and_verify(
    verifier: Any,
    draft: CacheFreeDraft,
    prompt: list[int],
    *,
    num_draft_tokens: int,
    max_new_tokens: int,
) -> Counts:
    """One greedy answer, up to the verifier's end token or `max_new_tokens`."""
    end = verifier.generation_config.eos_token_id
    layer_ids = draft.config["eagle_aux_hidden_state_layer_ids"]

    def ask(tokens: list[int]) -> tuple[list[int], list[Tensor]]:
        out = verifier(torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
        return out.logits[0].argmax(-1).tolist(), [out.hidden_states[k][0] for k in layer_ids]

    tokens, num_accepted = list(prompt), []
    own, aux = ask(tokens)
    tokens.append(own[-1])
    while len(tokens) - len(prompt) < max_new_tokens and end not in tokens[len(prompt) :]:
        chain = draft.chain(torch.tensor(tokens), aux, num_draft_tokens)
        own, aux = ask([*tokens, *chain])
        wanted = own[len(tokens) - 1 :]
        pairs = zip(chain, wanted, strict=False)
        count = next((i for i, (a, b) in enumerate(pairs) if a != b), len(chain))
        num_accepted.append(count)
        aux = [x[: len(tokens) + count] for x in aux]
        tokens += wanted[: count + 1]
    answer = tokens[len(prompt) :][:max_new_tokens]
    if end in answer:
        answer = answer[: answer.index(end) + 1]
    return Counts(tuple(answer), tuple(num_accepted))


def load_plain(folder: Path) -> Any:
    """transformers' own model, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

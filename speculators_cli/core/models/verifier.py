"""The verifier's frozen parts that training needs: embedding, final norm and head."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.repo_files import CONFIG_NAME
from speculators_cli.core.models.rope import choose_rope
from speculators_cli.core.models.verifier_files import VerifierFiles

BITS_AT_ONCE = 2**22  # values, in a sum over all of a tensor


@dataclass(frozen=True)
class VerifierConfig:
    """What a draft and its loss need to know of the verifier, from its config.json."""

    name_or_path: str
    architectures: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]  # as a draft can have it
    max_position_embeddings: int
    norm_offset: float  # what the final norm adds to its stored weight: 1 in the Gemma family
    is_tied: bool  # whether the head is the embedding
    logit_softcap: float | None  # logits are squashed to (-softcap, softcap)
    logit_scale: float  # logits are multiplied by this
    rope_left_out: str | None = None  # what a draft cannot have of its RoPE


def read_verifier_config(files: VerifierFiles, *, trust_remote_code: bool) -> VerifierConfig:
    """Read the verifier's config.json.

    Raises:
        SettingsError: The folder or its config.json cannot be used.
        MachineError: The hub cannot be reached, or refuses.
    """
    files.read_json(CONFIG_NAME)
    try:
        config = AutoConfig.from_pretrained(files.name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(
            f"The config of verifier `{files.name_or_path}` cannot be read: {reason}",
            hint="Name a causal language model, with `--trust-remote-code` if it brings code",
        ) from None
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    rope = choose_rope(
        text, head_dim=head_dim, max_position_embeddings=text.max_position_embeddings
    )
    return VerifierConfig(
        name_or_path=files.name_or_path,
        architectures=tuple(config.architectures or ()),
        hidden_size=text.hidden_size,
        intermediate_size=_intermediate_size(text),
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-6),
        rope_parameters=rope.parameters,
        rope_left_out=rope.left_out,
        max_position_embeddings=text.max_position_embeddings,
        norm_offset=_norm_offset(text, files.name_or_path, trust_remote_code=trust_remote_code),
        is_tied=bool(
            getattr(config, "tie_word_embeddings", False)
            or getattr(text, "tie_word_embeddings", False)
        ),
        logit_softcap=getattr(text, "final_logit_softcapping", None),
        logit_scale=1.0 / (getattr(text, "logits_scaling", None) or 1.0),
    )


def _intermediate_size(text: PreTrainedConfig) -> int:
    size = getattr(text, "intermediate_size", None)
    # Some families give one size a layer.
    return int(size[0] if isinstance(size, list) else size or 4 * text.hidden_size)


def _norm_offset(text: PreTrainedConfig, name: str, *, trust_remote_code: bool) -> float:
    """How the verifier's own final norm uses its weight `w`: 0 for `w`, 1 for `1 + w`.

    The norm of the verifier's class is run on random numbers, so every family is right that
    transformers knows, and one whose norm is no RMSNorm is refused.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, trust_remote_code=trust_remote_code)
    norm = getattr(model.get_decoder(), "norm", None)
    if norm is not None:
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(2, text.hidden_size, generator=generator)
        norm.to_empty(device="cpu").float()
        norm.load_state_dict(dict.fromkeys(norm.state_dict(), weight))
        with torch.no_grad():
            out = norm(x[None])[0]
        eps = getattr(text, "rms_norm_eps", 1e-6)
        for offset in (0.0, 1.0):
            # Both sides round in float32.
            if torch.allclose(out, F.rms_norm(x, x.shape, weight + offset, eps), 1e-4, 1e-4):
                return offset
    raise SettingsError(
        f"The final norm of verifier `{name}` is a `{type(norm).__name__}`, not an RMSNorm",
        hint="Choose a verifier whose last norm is an RMSNorm, such as Llama, Qwen or Gemma",
    )


def _sum_bits(tensor: Tensor) -> int:
    """A sum over the bits of all values that depends on their places, modulo 2^64.

    Whole numbers add up to the same in any order, so it is quick and exact where the tensor is.
    """
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for part in tensor.detach().contiguous().view(-1).view(whole).split(BITS_AT_ONCE):
        place = torch.arange(start, start + len(part), device=tensor.device)
        total += (part.long() * (place * 0x9E3779B97F4A7C1 + 1)).sum()
        start += len(part)
    return int(total)


class FrozenVerifier:
    """The verifier's embedding, final norm and head: no gradient, never sharded.

    Args:
        embedding: [vocab, hidden], in the verifier's dtype.
        norm_gain: [hidden], float32: the gain itself, `1 + w` already added up.
        head: [vocab, hidden], in the verifier's dtype.
        config: How the final norm and the logits are computed.
    """

    def __init__(
        self, embedding: Tensor, norm_gain: Tensor, head: Tensor, config: VerifierConfig
    ) -> None:
        self.embedding = embedding
        self.norm_gain = norm_gain
        self.head = head
        self.config = config

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.embedding.shape[0]

    def to(self, device: torch.device) -> "FrozenVerifier":
        """The same on `device`; a head tied to the embedding stays one tensor."""
        embedding = self.embedding.to(device)
        is_tied = self.head is self.embedding
        head = embedding if is_tied else self.head.to(device)
        return FrozenVerifier(embedding, self.norm_gain.to(device), head, self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any value of the three tensors; the same on every device."""
        parts = [self.embedding, self.norm_gain]
        if self.head is not self.embedding:
            parts.append(self.head)
        sums = [(list(part.shape), str(part.dtype), _sum_bits(part)) for part in parts]
        return sha256(repr(sums).encode()).hexdigest()[:32]

    @torch.no_grad()
    def normed(
        self,
        last_hidden_states: Tensor,  # [seq_len, hidden]
        is_normed: Tensor,  # [seq_len], bool
    ) -> Tensor:
        """Last hidden states after the final norm, which is applied where it was not yet."""
        x = last_hidden_states.float()
        normed = F.rms_norm(x, self.norm_gain.shape, self.norm_gain, self.config.rms_norm_eps)
        return torch.where(is_normed[:, None], x, normed).to(last_hidden_states.dtype)

    @torch.no_grad()
    def logits(
        self,
        normed: Tensor,  # [seq_len, hidden]
        head: Tensor,  # [rows, hidden]: the head, or some of its rows
    ) -> Tensor:
        """The verifier's logits of these rows; [seq_len, rows], float32."""
        logits = F.linear(normed, head.to(normed.dtype)).float() * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    @torch.no_grad()
    def tokens(
        self,
        normed: Tensor,  # [seq_len, hidden]
        *,
        rows_at_once: int = 1024,
    ) -> Tensor:
        """The verifier's own next tokens, over its whole vocabulary; [seq_len], int64."""
        parts = normed.split(rows_at_once)
        return torch.cat([self.logits(part, self.head).argmax(-1) for part in parts])


def load_frozen_verifier(files: VerifierFiles, config: VerifierConfig) -> FrozenVerifier:
    """Read embedding, final norm and head on the CPU; nothing else of the verifier is read.

    Raises:
        SettingsError: They are missing, damaged, quantised or of sizes that contradict the config.
        MachineError: A file of the hub cannot be fetched.
    """
    names = files.find_parts(is_tied=config.is_tied)
    embedding = _read_tensor(files, names.embedding)
    is_tied = names.head == names.embedding
    head = embedding if is_tied else _read_tensor(files, names.head)
    gain = load_final_norm_gain(files, config)
    expected = (embedding.shape[0], config.hidden_size)
    for name, tensor in ((names.embedding, embedding), (names.head, head)):
        if tensor.shape != expected:
            raise SettingsError(
                f"`{name}` of verifier `{files.name_or_path}` is {tuple(tensor.shape)}, "
                f"expected {expected}",
                hint="Download the verifier again",
            )
    return FrozenVerifier(embedding, gain, head, config)


def load_embedding(files: VerifierFiles, config: VerifierConfig) -> Tensor:
    """The verifier's embedding; [vocab, hidden], in its dtype.

    Raises:
        SettingsError: The verifier has no such tensor, or a quantised one.
        MachineError: A file of the hub cannot be fetched.
    """
    return _read_tensor(files, files.find_parts(is_tied=config.is_tied).embedding)


def load_final_norm_gain(files: VerifierFiles, config: VerifierConfig) -> Tensor:
    """The gain of the final norm itself, `1 + w` already added up; [hidden], float32.

    Raises:
        SettingsError: The verifier has no such tensor.
        MachineError: A file of the hub cannot be fetched.
    """
    names = files.find_parts(is_tied=config.is_tied)
    return _read_tensor(files, names.norm).float() + config.norm_offset


def _read_tensor(files: VerifierFiles, name: str) -> Tensor:
    with files.open(name) as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise SettingsError(
            f"`{name}` of verifier `{files.name_or_path}` is quantised ({tensor.dtype})",
            hint="Pass the verifier before quantisation: its head gives the training targets",
        )
    return tensor

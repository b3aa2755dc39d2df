"""The verifier's frozen parts that training needs: embedding, final norm and LM head."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.family import Family
from speculators_cli.core.models.plain_family import plain_readout
from speculators_cli.core.models.readout import Readout, apply_logit_options, apply_norm
from speculators_cli.core.models.verifier_files import PartNames, VerifierFiles
from speculators_cli.core.models.verifier_shape import (
    VerifierShape,
    given_tie,
    hint_of,
    open_family,
    read_sizes,
)
from speculators_cli.core.models.verifier_weights import read_weight
from speculators_cli.core.progress import Progress, SilentProgress

BITS_AT_ONCE = 2**22  # values per chunk of a sum over a tensor


@dataclass(frozen=True, kw_only=True)
class VerifierConfig(VerifierShape):
    """Sizes of the verifier, and how its final norm and LM head compute logits.

    `rms_norm_eps` is that of the final norm, of whatever type.
    """

    norm_offset: float  # added by the final norm to its stored weights: 1 in the Gemma family
    logit_softcap: float | None  # logits are squashed to (-softcap, softcap)
    logit_scale: float  # logits are multiplied by this
    is_norm_centred: bool = False  # LayerNorm, which subtracts the mean; else RMSNorm
    modules: PartNames | None = None  # names of the parts in the family's own model


def read_verifier_config(files: VerifierFiles, *, trust_remote_code: bool) -> VerifierConfig:
    """Read the verifier's config.json, and measure how its family computes logits.

    Raises:
        SettingsError: The folder or its config.json cannot be used, or the family's logits are not
            those of a norm and an LM head.
        MachineError: The hub is unreachable or denies access.
    """
    family = open_family(files, trust_remote_code=trust_remote_code)
    sizes = read_sizes(family)
    readout = plain_readout(family) if family.is_plain else _measure(family)
    modules = PartNames(readout.embedding, readout.norm, readout.head)
    given = given_tie(family)
    is_tied = readout.is_tied and given is not False
    if given and not is_tied:
        # Its own code may have an LM head all the same, but the files may not.
        is_tied = files.find_head(modules) is None
    return VerifierConfig(
        **sizes
        | {
            "rms_norm_eps": readout.eps,
            "is_tied": is_tied,
        },
        norm_offset=readout.offset,
        logit_softcap=readout.softcap,
        logit_scale=readout.scale,
        is_norm_centred=readout.is_centred,
        modules=modules,
    )


def _measure(family: Family) -> Readout:
    # It takes seconds to import.
    from speculators_cli.core.models.readout_measurement import (
        UnsupportedReadoutError,
        measure_readout,
    )

    try:
        return measure_readout(family)
    except UnsupportedReadoutError as error:
        kind = family.content.get("model_type")
        raise SettingsError(
            f"Verifier `{family.name}` (`{kind}`) {error}", hint=hint_of(family)
        ) from None


def _sum_bits(tensor: Tensor) -> int:
    """Return a position-dependent sum over the bits of all values, modulo 2^64.

    Integer addition is independent of the order, so the sum is fast and exact on any device.
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
    """The verifier's embedding, final norm and LM head: without gradients, never sharded.

    Args:
        embedding: [vocab, hidden], in the verifier's dtype.
        norm_weight: [hidden], float32: weights of the final norm, `1 + w` where the family adds 1.
        head: [vocab, hidden], in the verifier's dtype; on the host while it rests.
        config: How the final norm and the logits are computed.
        norm_bias: [hidden], float32.
        head_bias: [vocab].
    """

    def __init__(
        self,
        embedding: Tensor,
        norm_weight: Tensor,
        head: Tensor,
        config: VerifierConfig,
        *,
        norm_bias: Tensor | None = None,
        head_bias: Tensor | None = None,
    ) -> None:
        self.embedding = embedding
        self.norm_weight = norm_weight
        self.head = head
        self.config = config
        self.norm_bias = norm_bias
        self.head_bias = head_bias

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding."""
        return self.embedding.shape[0]

    @property
    def has_rms_norm(self) -> bool:
        """Whether the final norm is an RMSNorm without a bias, for which there are kernels."""
        return not self.config.is_norm_centred and self.norm_bias is None

    def to(self, device: torch.device) -> "FrozenVerifier":
        """Return a copy on `device`; a tied LM head shares the tensor of the embedding."""
        embedding = self.embedding.to(device)
        is_tied = self.head is self.embedding
        return FrozenVerifier(
            embedding,
            self.norm_weight.to(device),
            embedding if is_tied else self.head.to(device),
            self.config,
            norm_bias=None if self.norm_bias is None else self.norm_bias.to(device),
            head_bias=None if self.head_bias is None else self.head_bias.to(device),
        )

    def rest_head(self, host_head: Tensor | None = None) -> None:
        """Move the LM head to the host, unless it is the embedding: only `tokens` needs it.

        Args:
            host_head: The same on the host, which is copied: its file may be mapped, and must not
                shrink. None: the head is read back from its device.
        """
        if self.head is self.embedding or self.head.device.type == "cpu":
            return
        self.head = self.head.cpu() if host_head is None else host_head.clone()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have the LM head on the device of the embedding."""
        resting = self.head
        self.head = resting.to(self.embedding.device)
        try:
            yield
        finally:
            self.head = resting

    def bias_of(self, ids: Tensor) -> Tensor | None:
        """Return the LM head's bias of these tokens, if it has one."""
        return None if self.head_bias is None else self.head_bias[ids]

    @cached_property
    def fingerprint(self) -> str:
        """Return a hash that depends on every value of the tensors, and not on the device."""
        parts = [self.embedding, self.norm_weight]
        if self.head is not self.embedding:
            parts.append(self.head)
        parts += [bias for bias in (self.norm_bias, self.head_bias) if bias is not None]
        sums = [(list(part.shape), str(part.dtype), _sum_bits(part)) for part in parts]
        return sha256(repr(sums).encode()).hexdigest()[:32]

    @torch.no_grad()
    def normed(
        self,
        last_hidden_states: Tensor,  # [seq_len, hidden]
        is_normed: Tensor,  # [seq_len], bool
    ) -> Tensor:
        """Apply the final norm to last hidden states, except where `is_normed`."""
        x = last_hidden_states.float()
        normed = apply_norm(
            x,
            self.norm_weight,
            self.norm_bias,
            self.config.rms_norm_eps,
            is_centred=self.config.is_norm_centred,
        )
        return torch.where(is_normed[:, None], x, normed).to(last_hidden_states.dtype)

    @torch.no_grad()
    def logits(
        self,
        normed: Tensor,  # [seq_len, hidden]
        head: Tensor,  # the LM head, or some of its rows
        bias: Tensor | None = None,  # of these rows; may be omitted for the whole LM head
    ) -> Tensor:
        """Compute the verifier's logits for these rows; [seq_len, rows], float32."""
        bias = self.head_bias if head is self.head else bias
        bias = None if bias is None else bias.to(normed.dtype)
        logits = F.linear(normed, head.to(normed.dtype), bias).float()
        return apply_logit_options(
            logits, scale=self.config.logit_scale, softcap=self.config.logit_softcap
        )

    @torch.no_grad()
    def tokens(
        self,
        normed: Tensor,  # [seq_len, hidden]
        *,
        rows_at_once: int = 1024,
    ) -> Tensor:
        """Return the verifier's top-1 next tokens, over its whole vocabulary; [seq_len], int64."""
        parts = normed.split(rows_at_once)
        return torch.cat([self.logits(part, self.head).argmax(-1) for part in parts])


def load_frozen_verifier(
    files: VerifierFiles, config: VerifierConfig, *, progress: Progress | None = None
) -> FrozenVerifier:
    """Read embedding, final norm and LM head on the CPU; no other weights are read.

    Args:
        files: Files of the verifier.
        config: How its logits are computed.
        progress: Receives a warning if an LM head in the files is not used.

    Raises:
        SettingsError: They are missing, damaged, quantised in an unsupported format, or contradict
            the sizes in the config.
        MachineError: A download from the hub fails.
    """
    names = files.find_parts(is_tied=config.is_tied, modules=config.modules)
    embedding = read_weight(files, names.embedding)
    is_tied = names.head == names.embedding
    head = embedding if is_tied else read_weight(files, names.head)
    norm_weight, norm_bias = load_final_norm(files, config)
    vocab_size = embedding.shape[0]
    head_name = files.find_head(config.modules) or "lm_head.weight"
    head_bias = _read_bias(files, head_name)
    for name, tensor, expected in (
        (names.embedding, embedding, (vocab_size, config.hidden_size)),
        (names.head, head, (vocab_size, config.hidden_size)),
        (_bias_name(head_name), head_bias, (vocab_size,)),
        (names.norm, norm_weight, (config.hidden_size,)),
        (_bias_name(names.norm or ""), norm_bias, (config.hidden_size,)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise SettingsError(
                f"`{name}` of verifier `{files.name_or_path}` is {tuple(tensor.shape)}, "
                f"expected {expected}",
                hint="Pass a verifier whose embedding and LM head have equal sizes, or download it "
                "again",
            )
    if is_tied and head_name in files.weight_map:
        _compare_tied(files, head_name, embedding, progress or SilentProgress())
    return FrozenVerifier(
        embedding,
        norm_weight,
        head,
        config,
        norm_bias=norm_bias,
        head_bias=head_bias,
    )


def _compare_tied(files: VerifierFiles, name: str, embedding: Tensor, progress: Progress) -> None:
    """Warn if an LM head is not used, as in serving engines."""
    head = read_weight(files, name)
    if not torch.equal(head.to(embedding.dtype), embedding):
        progress.warn(
            f"`{name}` of verifier `{files.name_or_path}` differs from its embedding and is not "
            "used: the config sets `tie_word_embeddings`, so serving engines use the embedding",
            hint="Set `tie_word_embeddings` to false in its config.json to use it",
        )


def load_embedding(files: VerifierFiles) -> Tensor:
    """Load the verifier's embedding; [vocab, hidden], in its dtype.

    Raises:
        SettingsError: The verifier has no embedding, or it is quantised in an unsupported format.
        MachineError: A download from the hub fails.
    """
    return read_weight(files, files.find_embedding())


def load_final_norm(files: VerifierFiles, config: VerifierConfig) -> tuple[Tensor, Tensor | None]:
    """Load weights and bias of the final norm, `1 + w` where the family adds 1; [hidden], float32.

    Raises:
        SettingsError: The verifier has no final norm.
        MachineError: A download from the hub fails.
    """
    name = files.find_parts(is_tied=config.is_tied, modules=config.modules).norm
    if name is None:
        return torch.ones(config.hidden_size), None
    bias = _read_bias(files, name)
    norm_weight = read_weight(files, name).float() + config.norm_offset
    return norm_weight, None if bias is None else bias.float()


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _read_bias(files: VerifierFiles, weight: str) -> Tensor | None:
    name = _bias_name(weight)
    if name not in files.weight_map:
        return None
    with files.open(name) as tensors:
        return tensors.get_tensor(name)

"""The verifier's frozen parts that training needs: embedding, final norm and head."""

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.readout import (
    UnlikeError,
    apply_logit_options,
    apply_norm,
    measure_readout,
)
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

BITS_AT_ONCE = 2**22  # values, in a sum over all of a tensor


@dataclass(frozen=True, kw_only=True)
class VerifierConfig(VerifierShape):
    """Sizes of the verifier, and how its final norm and LM head make logits.

    `rms_norm_eps` is that of the final norm, of whatever kind it is.
    """

    norm_offset: float  # what the final norm adds to its stored weight: 1 in the Gemma family
    logit_softcap: float | None  # logits are squashed to (-softcap, softcap)
    logit_scale: float  # logits are multiplied by this
    is_norm_centred: bool = False  # LayerNorm, which subtracts the mean; else RMSNorm
    modules: PartNames | None = None  # names of the parts in the family's own model


def read_verifier_config(files: VerifierFiles, *, trust_remote_code: bool) -> VerifierConfig:
    """Read the verifier's config.json, and measure how its family makes logits.

    Raises:
        SettingsError: The folder or its config.json cannot be used, or the family's logits are not
            those of a norm and an LM head.
        MachineError: The hub cannot be reached, or refuses.
    """
    family = open_family(files, trust_remote_code=trust_remote_code)
    sizes = read_sizes(family)
    try:
        readout = measure_readout(family)
    except UnlikeError as error:
        kind = family.content.get("model_type")
        raise SettingsError(
            f"Verifier `{files.name_or_path}` (`{kind}`) {error}", hint=hint_of(family)
        ) from None
    modules = PartNames(readout.embedding, readout.norm, readout.head)
    given = given_tie(family)
    is_tied = readout.is_tied and given is not False
    if given and not is_tied:
        # Its own code has a head all the same, unless none was saved.
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
    """The verifier's embedding, final norm and LM head: no gradient, never sharded.

    Args:
        embedding: [vocab, hidden], in the verifier's dtype.
        norm_gain: [hidden], float32: the norm weights themselves, `1 + w` already added up.
        head: [vocab, hidden], in the verifier's dtype.
        config: How the final norm and the logits are computed.
        norm_bias: [hidden], float32.
        head_bias: [vocab].
    """

    def __init__(
        self,
        embedding: Tensor,
        norm_gain: Tensor,
        head: Tensor,
        config: VerifierConfig,
        *,
        norm_bias: Tensor | None = None,
        head_bias: Tensor | None = None,
    ) -> None:
        self.embedding = embedding
        self.norm_gain = norm_gain
        self.head = head
        self.config = config
        self.norm_bias = norm_bias
        self.head_bias = head_bias

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.embedding.shape[0]

    @property
    def has_rms_norm(self) -> bool:
        """Whether the final norm is an RMSNorm without a bias, for which there are kernels."""
        return not self.config.is_norm_centred and self.norm_bias is None

    def to(self, device: torch.device) -> "FrozenVerifier":
        """The same on `device`; a head tied to the embedding stays one tensor."""
        embedding = self.embedding.to(device)
        is_tied = self.head is self.embedding
        return FrozenVerifier(
            embedding,
            self.norm_gain.to(device),
            embedding if is_tied else self.head.to(device),
            self.config,
            norm_bias=None if self.norm_bias is None else self.norm_bias.to(device),
            head_bias=None if self.head_bias is None else self.head_bias.to(device),
        )

    def bias_of(self, ids: Tensor) -> Tensor | None:
        """The LM head's bias of these tokens, if it has one."""
        return None if self.head_bias is None else self.head_bias[ids]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any value of the tensors; the same on every device."""
        parts = [self.embedding, self.norm_gain]
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
        """Last hidden states after the final norm, which is applied where it was not yet."""
        x = last_hidden_states.float()
        normed = apply_norm(
            x,
            self.norm_gain,
            self.norm_bias,
            self.config.rms_norm_eps,
            is_centred=self.config.is_norm_centred,
        )
        return torch.where(is_normed[:, None], x, normed).to(last_hidden_states.dtype)

    @torch.no_grad()
    def logits(
        self,
        normed: Tensor,  # [seq_len, hidden]
        head: Tensor,  # [rows, hidden]: the head, or some of its rows
        bias: Tensor | None = None,  # [rows]: of these rows; known where they are the whole head
    ) -> Tensor:
        """The verifier's logits of these rows; [seq_len, rows], float32."""
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
        """The verifier's own next tokens, over its whole vocabulary; [seq_len], int64."""
        parts = normed.split(rows_at_once)
        return torch.cat([self.logits(part, self.head).argmax(-1) for part in parts])


def load_frozen_verifier(
    files: VerifierFiles, config: VerifierConfig, *, progress: Progress | None = None
) -> FrozenVerifier:
    """Read embedding, final norm and LM head on the CPU; nothing else of the verifier is read.

    Args:
        files: The verifier's.
        config: How its logits are made.
        progress: Receives a warning about an LM head that is not used.

    Raises:
        SettingsError: They are missing, damaged, quantised in a format that is not read, or of
            sizes that contradict the config.
        MachineError: A file of the hub cannot be fetched.
    """
    names = files.find_parts(is_tied=config.is_tied, modules=config.modules)
    embedding = read_weight(files, names.embedding)
    is_tied = names.head == names.embedding
    head = embedding if is_tied else read_weight(files, names.head)
    gain, norm_bias = load_final_norm(files, config)
    vocab_size = embedding.shape[0]
    head_name = files.find_head(config.modules) or "lm_head.weight"
    head_bias = _read_bias(files, head_name)
    for name, tensor, expected in (
        (names.embedding, embedding, (vocab_size, config.hidden_size)),
        (names.head, head, (vocab_size, config.hidden_size)),
        (_bias_name(head_name), head_bias, (vocab_size,)),
        (names.norm, gain, (config.hidden_size,)),
        (_bias_name(names.norm or ""), norm_bias, (config.hidden_size,)),
    ):
        if tensor is not None and tensor.shape != expected:
            raise SettingsError(
                f"`{name}` of verifier `{files.name_or_path}` is {tuple(tensor.shape)}, "
                f"expected {expected}",
                hint="Pass a verifier whose embedding and LM head have the same rows; if this one "
                "should, download it again",
            )
    if is_tied and head_name in files.weight_map:
        _compare_tied(files, head_name, embedding, progress or SilentProgress())
    return FrozenVerifier(
        embedding,
        gain,
        head,
        config,
        norm_bias=norm_bias,
        head_bias=head_bias,
    )


def _compare_tied(files: VerifierFiles, name: str, embedding: Tensor, progress: Progress) -> None:
    """Warn of an LM head that serving engines do not read either."""
    head = read_weight(files, name)
    if not torch.equal(head.to(embedding.dtype), embedding):
        progress.warn(
            f"`{name}` of verifier `{files.name_or_path}` differs from its embedding and is not "
            "used: the config sets `tie_word_embeddings`, so serving engines use the embedding",
            hint="Set `tie_word_embeddings` to false in its config.json if it should be used",
        )


def load_embedding(files: VerifierFiles) -> Tensor:
    """The verifier's embedding; [vocab, hidden], in its dtype.

    Raises:
        SettingsError: The verifier has no such tensor, or a quantised one.
        MachineError: A file of the hub cannot be fetched.
    """
    return read_weight(files, files.find_embedding())


def load_final_norm(files: VerifierFiles, config: VerifierConfig) -> tuple[Tensor, Tensor | None]:
    """Weights of the final norm, `1 + w` already added up, and its bias; [hidden], float32.

    Raises:
        SettingsError: The verifier has no such tensor.
        MachineError: A file of the hub cannot be fetched.
    """
    name = files.find_parts(is_tied=config.is_tied, modules=config.modules).norm
    if name is None:
        return torch.ones(config.hidden_size), None
    bias = _read_bias(files, name)
    gain = read_weight(files, name).float() + config.norm_offset
    return gain, None if bias is None else bias.float()


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _read_bias(files: VerifierFiles, weight: str) -> Tensor | None:
    name = _bias_name(weight)
    if name not in files.weight_map:
        return None
    with files.open(name) as tensors:
        return tensors.get_tensor(name)

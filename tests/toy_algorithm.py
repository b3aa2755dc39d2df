"""A small algorithm of another kind than those of the package: one draft token for each pass.

`docs/how-to/add-an-algorithm.md` shows this file part by part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.cost import CostModel, Gpu, Work
from speculators_cli.core.algorithms.draft_config import LAYER_IDS_ASSUMED, DraftConfig
from speculators_cli.core.algorithms.draft_model import DraftModel, Ratio, StepSums
from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.attention import AttentionMemory, CausalMemory
from speculators_cli.core.models.layers import DecoderLayer, Linear, RMSNorm, RotaryEmbedding
from speculators_cli.core.models.losses import kl_loss
from speculators_cli.core.models.row_memory import RowMemory, RowPositions
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.settings.base import WARNED_ON_RESUME, Settings
from speculators_cli.settings.train import TrainSettings


class ToySettings(Settings):
    """Settings that only the toy algorithm has."""

    top_k: Annotated[int, WARNED_ON_RESUME] = Field(
        5, ge=1, description="Number of best draft tokens that count as a hit"
    )


class ToyTrainSettings(TrainSettings):
    """The settings of `train` with one section more."""

    toy: ToySettings = Field(default_factory=ToySettings, title="Toy")


@dataclass(frozen=True, kw_only=True)
class ToyConfig(DraftConfig):
    """Shape of a toy draft: decoder layers over aux hidden states and a token two ahead."""

    algorithm: ClassVar[str] = "toy"
    layer_ids_key: ClassVar[str] = "toy_layer_ids"

    @property
    def num_draft_tokens(self) -> int:
        """One token for each verifier pass."""
        return 1

    def with_num_draft_tokens(self, num_draft_tokens: int) -> Self:
        """The same draft: it always proposes one token."""
        del num_draft_tokens
        return self

    @property
    def input_size(self) -> int:
        """Width of what `fc` reads: aux hidden states and one embedding."""
        return self.num_aux_layers * self.target_hidden_size + self.hidden_size

    def to_json(self, *, dtype: str = "float32") -> dict[str, Any]:
        """Contents of config.json."""
        return {
            **self.speculators_json(),
            "transformer_layer_config": self.layers_json(vocab_size=self.vocab_size),
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": self.target_hidden_size,
            self.layer_ids_key: list(self.target_layer_ids),
            "dtype": dtype,
            **self.own_json(),
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the draft."""
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (self.hidden_size, self.input_size),
            "norm.weight": (self.hidden_size,),
            "lm_head.weight": (self.draft_vocab_size, self.hidden_size),
        }
        for index in range(self.num_layers):
            layer = self.layer_shapes(input_size=self.hidden_size)
            shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        return shapes


def read_toy_config(content: Mapping[str, Any], overrides: Overrides) -> ToyConfig:
    """The config that `ToyConfig.to_json` wrote."""
    layers, verifier = (
        content["transformer_layer_config"],
        content["speculators_config"]["verifier"],
    )
    return ToyConfig(
        arch=layers["model_type"],
        hidden_size=layers["hidden_size"],
        intermediate_size=layers["intermediate_size"],
        num_layers=layers["num_hidden_layers"],
        num_heads=layers["num_attention_heads"],
        num_kv_heads=layers["num_key_value_heads"],
        head_dim=layers["head_dim"],
        rms_norm_eps=layers["rms_norm_eps"],
        rope_parameters=layers["rope_parameters"],
        max_position_embeddings=layers["max_position_embeddings"],
        vocab_size=layers["vocab_size"],
        draft_vocab_size=content["draft_vocab_size"],
        target_hidden_size=content["target_hidden_size"],
        target_layer_ids=overrides.target_layer_ids or tuple(content[ToyConfig.layer_ids_key]),
        are_layer_ids_assumed=content.get(LAYER_IDS_ASSUMED) is True,
        verifier_name_or_path=overrides.verifier_name_or_path or verifier["name_or_path"],
        verifier_architectures=tuple(verifier["architectures"]),
    )


class ToyDraft(nn.Module):
    """The network: drafting runs it over one sequence, training over each document."""

    config: ToyConfig

    def __init__(self, config: ToyConfig, embedding: Tensor) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding  # the verifier's: frozen, and no parameter
        self.fc = Linear(config.input_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.draft_vocab_size)
        self.rotary = RotaryEmbedding(config)

    def run(
        self,
        tokens: Tensor,  # [new], int64: verifier ids
        aux_hidden_states: Tensor,  # [new, aux*hidden]
        position_ids: Tensor,  # [new], int64
        memories: Sequence[AttentionMemory],
    ) -> Tensor:
        """What `lm_head` reads at the next positions of one document; [new, hidden]."""
        embedded = self.embedding[tokens].to(aux_hidden_states.dtype)
        hidden = self.fc(torch.cat((aux_hidden_states, embedded), dim=-1))
        rope = self.rotary(position_ids)
        for layer, memory in zip(self.layers, memories, strict=True):
            hidden = layer(hidden, rope, memory)
        normed: Tensor = self.norm(hidden)
        return normed


class ToyTraining(ToyDraft, DraftModel):
    """A toy draft that is trained on the verifier's distributions."""

    config: ToyConfig
    counters = ("losses", "num_scored", "num_hits", "confidence")
    ratios = (
        Ratio("loss", "losses", "num_scored"),
        Ratio("hit_rate", "num_hits", "num_scored"),
        Ratio("mean_confidence", "confidence", "num_scored"),
    )
    loss_weights = (1.0,)
    use_fast_kernels = False

    def __init__(
        self, config: ToyConfig, verifier: FrozenVerifier, vocab_map: VocabMap, top_k: int
    ) -> None:
        super().__init__(config, verifier.embedding)
        self.verifier, self.vocab_map, self.top_k = verifier, vocab_map, top_k
        self.kept_ids = vocab_map.kept_ids.to(verifier.head.device)

    def initialise(self, seed: int) -> None:
        """Fill the weights: norms one, matrices normal."""
        generator = torch.Generator(self.fc.weight.device).manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)

    def count_scored(self, batch: Batch) -> Tensor:
        """Supervised positions; [1], int64."""
        return batch.loss_mask.sum()[None]

    def logits(self, batch: Batch) -> Tensor:
        """Logits at the targets of a batch; [targets, draft_vocab]."""
        normed = self.fc.weight.new_zeros(len(batch.input_ids), self.config.hidden_size)
        normed = normed.to(batch.aux_hidden_states.dtype)
        start = 0
        for length in batch.lengths:
            rows = slice(start, start + length)
            normed[rows] = self.run(
                batch.input_ids[rows],
                batch.aux_hidden_states[rows],
                batch.position_ids[rows],
                [CausalMemory() for _ in self.layers],
            )
            start += length
        logits: Tensor = self.lm_head(normed[batch.targets])
        return logits

    def forward(self, batch: Batch, weights: Tensor | None = None) -> StepSums:
        """Score every target of the batch."""
        logits = self.logits(batch)
        states = self.verifier.normed(batch.last_hidden_states, batch.is_normed)
        rows, bias = self.verifier.head[self.kept_ids], self.verifier.bias_of(self.kept_ids)
        expected = self.verifier.logits(states, rows, bias)
        # A document with broken hidden states keeps its targets, and loses its mask.
        scored = batch.loss_mask[batch.targets]
        losses = kl_loss(logits, expected.log_softmax(-1)).masked_fill(~scored, 0.0).sum()[None]
        best = logits.detach().float().softmax(-1).topk(min(self.top_k, logits.shape[-1]), dim=-1)
        is_hit = (best.indices == expected.argmax(-1, keepdim=True)).any(-1)
        confidence = best.values[:, 0].masked_fill(~scored, 0.0)
        return StepSums(
            loss=(losses if weights is None else losses * weights).sum(),
            counters={
                "losses": losses,
                "num_scored": scored.sum()[None],
                "num_hits": (is_hit & scored).sum()[None],
                "confidence": confidence.sum()[None],
            },
        )

    def frozen_tensors(self) -> Mapping[str, Tensor]:
        """The verifier's embedding and the vocabulary maps."""
        tensors = {"embed_tokens.weight": self.embedding}
        if not self.vocab_map.is_full:
            tensors |= {"d2t": self.vocab_map.d2t, "t2d": self.vocab_map.t2d}
        return tensors


class ToyDrafter:
    """Proposes one token after the verified ones.

    Position p reads the token after the next, so the newest aux hidden states wait for theirs.
    """

    num_draft_tokens = 1

    def __init__(self, draft: ToyDraft, kept_ids: Tensor) -> None:
        self.draft, self.kept_ids = draft, kept_ids
        self.start(0, 0)

    def start(self, num_rows: int, num_positions: int) -> None:
        """Begin a batch."""
        self.memories = [RowMemory(num_rows, num_positions) for _ in self.draft.layers]
        self.chosen = self.kept_ids.new_zeros(num_rows)
        width = self.draft.config.num_aux_layers * self.draft.config.target_hidden_size
        self.waiting = torch.zeros(num_rows, width)  # of each row

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""
        for memory in self.memories:
            memory.keep(rows)
        self.chosen, self.waiting = self.chosen[list(rows)], self.waiting[list(rows)]

    @torch.inference_mode()
    def read(self, verified: Verified) -> None:
        """Take in newly verified positions."""
        tokens, aux, row = verified.tokens, verified.aux, verified.row
        rows, counts = torch.arange(len(tokens)), torch.tensor(verified.counts)
        newest = aux[rows, counts - 1]
        if row is None:
            aux = torch.cat((self.waiting[:, None], aux), dim=1)
            firsts = [first - 1 for first in verified.firsts]
            self.waiting = newest
        else:
            tokens, counts, firsts = tokens[:, 1:], counts - 1, list(verified.firsts)
            self.waiting[row] = newest[0]
        if tokens.shape[1] == 0:
            return
        positions = RowPositions(tuple(firsts), tokens.shape[1], tokens.device, row)
        normed = self.draft.run(
            tokens.flatten(),
            aux[:, :-1].flatten(0, 1),
            positions.ids.flatten() + 1,
            [memory.at(positions) for memory in self.memories],
        )
        last = normed.unflatten(0, tokens.shape)[rows, counts - 1]
        chosen = self.kept_ids[self.draft.lm_head(last).argmax(-1)]
        self.chosen[slice(None) if row is None else slice(row, row + 1)] = chosen

    def propose(self) -> Tensor:
        """Draft one token after the last verified one of each row; [rows, 1], int64."""
        return self.chosen[:, None].clone()


class ToyCost(CostModel[ToyConfig, ToySettings]):
    """Every weight is used once for each position, forward and twice backward."""

    def count_work(
        self, config: ToyConfig, settings: ToySettings, loss_mask: Tensor, lengths: Sequence[int]
    ) -> Work:
        """The work of one packed sequence, from its masks."""
        return _make_work(config, sum(lengths), int(loss_mask.sum()))

    def expect_work(
        self,
        config: ToyConfig,
        settings: ToySettings,
        lengths: NDArray[np.int64],
        num_targets: NDArray[np.int64],
    ) -> Work:
        """The same from headers."""
        return _make_work(config, int(lengths.sum()), int(num_targets.sum()))

    def count_trained(self, config: ToyConfig, settings: ToySettings) -> int:
        """All weights are trained."""
        return config.count_parameters()

    def estimate_memory(
        self,
        config: ToyConfig,
        settings: ToySettings,
        work: Sequence[Work],
        *,
        total_seq_len: int,
        num_accumulated: int = 1,
        num_ranks: int = 1,
        num_shards: int = 1,
        has_whole_head: bool = False,
        in_float8: bool = False,
    ) -> Mapping[str, int]:
        """Weights, gradients and two moments; activations of the longest packed sequence."""
        return {
            "weights": 16 * config.count_parameters() // num_shards,
            "activations": 4 * total_seq_len * config.input_size,
        }

    def estimate_seconds(self, flops: float, num_trained: int, gpu: Gpu) -> float:
        """Seconds of a step at half of the peak."""
        return flops / (0.5 * gpu.flops)


def _make_work(config: ToyConfig, num_positions: int, num_targets: int) -> Work:
    return Work(
        num_positions=num_positions,
        num_targets=num_targets,
        num_active=num_positions,
        flops=6.0 * config.count_parameters() * num_positions,
    )


class Toy(Algorithm[ToyConfig, ToySettings]):
    """The toy algorithm, as the table of algorithms has it."""

    name = "toy"
    settings_class = ToySettings
    alignment = Alignment(shift=2)
    cost = ToyCost()

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether a config.json is of a toy draft."""
        return content.get("speculators_model_type") == self.name

    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> ToyConfig:
        """The config of a trained draft."""
        return read_toy_config(content, overrides)

    def build_config(self, settings: ToySettings, shape: Mapping[str, Any]) -> ToyConfig:
        """The config of a fresh draft."""
        return ToyConfig(**shape)

    def build(
        self,
        config: ToyConfig,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: ToySettings,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> ToyTraining:
        """A fresh draft, ready to train."""
        with verifier.head.device:
            draft = ToyTraining(config, verifier, vocab_map, settings.top_k)
        draft.initialise(seed)
        return draft

    def build_drafter(
        self,
        config: ToyConfig,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        kept_ids: Tensor,
        *,
        num_draft_tokens: int,
        head: Tensor | None = None,
    ) -> ToyDrafter:
        """A trained draft that proposes tokens."""
        return ToyDrafter(load_toy(config, weights, embedding), kept_ids.to(embedding.device))

    @torch.inference_mode()
    def compute_probe_logits(
        self, config: ToyConfig, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Tensor:
        """Logits over fixed random inputs; [8, draft_vocab]."""
        draft, generator = load_toy(config, weights, embedding), torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (8,), generator=generator)
        width = config.num_aux_layers * config.target_hidden_size
        aux = torch.randn(8, width, generator=generator)
        memories = [CausalMemory() for _ in draft.layers]
        logits: Tensor = draft.lm_head(draft.run(tokens, aux, torch.arange(1, 9), memories))
        return logits


def load_toy(config: ToyConfig, weights: Mapping[str, Tensor], embedding: Tensor) -> ToyDraft:
    """A trained draft in float32, on the device of the embedding."""
    with embedding.device:
        draft = ToyDraft(config, embedding)
    draft.load_state_dict(dict(weights))
    return draft.eval()

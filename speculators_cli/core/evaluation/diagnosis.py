"""Why a draft is accepted less than it could be: one thing is changed at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.evaluation.draft_and_verify import Answer
from speculators_cli.core.evaluation.forced_drafting import (
    Forced,
    draft_everywhere,
    force_answers,
)
from speculators_cli.core.evaluation.intervals import Interval, difference_interval
from speculators_cli.core.evaluation.measurement import Measurement
from speculators_cli.core.evaluation.verifier import LoadedVerifier
from speculators_cli.core.models.readout import apply_norm
from speculators_cli.core.models.verifier import VerifierConfig, load_final_norm
from speculators_cli.core.models.verifier_files import VerifierFiles

SUSPICIOUS_SHARE = 0.5  # of the draft tokens that validation estimated to be accepted
PLAIN_THETA = 10_000.0  # of RoPE, where a config has none


@dataclass(frozen=True)
class Cause:
    """A change, and what it does to the acceptance length."""

    name: str  # what may be wrong
    change: str  # that was tried
    acceptance_length: float
    gain: float
    interval: Interval | None  # of the gain

    @property
    def is_real(self) -> bool:
        """Whether the gain is beyond chance."""
        return self.interval is not None and self.interval[0] > 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "cause": self.name,
            "change": self.change,
            "acceptance_length": self.acceptance_length,
            "gain": self.gain,
            "gain_interval": None if self.interval is None else list(self.interval),
            "is_real": self.is_real,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What explains a low acceptance length, the largest gain first."""

    acceptance_length: float  # after every token of the answers
    simulated: float | None  # of the checkpoint's validation
    causes: tuple[Cause, ...]

    @property
    def found(self) -> tuple[Cause, ...]:
        """The causes whose gain is beyond chance."""
        return tuple(cause for cause in self.causes if cause.is_real)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "acceptance_length": self.acceptance_length,
            "simulated_acceptance_length": self.simulated,
            "causes": [cause.to_json() for cause in self.causes],
        }


@dataclass(frozen=True, eq=False)
class _Variant:
    """One change of the draft, or of what it reads."""

    name: str
    change: str
    source: TrainedDraft
    layer_ids: tuple[int, ...]
    normed_layer: int | None = None  # whose states are normed first


def neighbours(layer_ids: Sequence[int], num_layers: int) -> set[int]:
    """Layers that a draft may have been trained on, if its ids are off by one."""
    near = {k + shift for k in layer_ids for shift in (-1, 0, 1)}
    return {k for k in near if 0 <= k <= num_layers}


def is_suspicious(source: TrainedDraft, measured: Measurement) -> bool:
    """Whether far fewer draft tokens are accepted than the checkpoint's validation estimated."""
    if source.checkpoint is None:
        return False
    simulated = source.checkpoint.state.metrics.get("acceptance_length")
    if simulated is None:
        return False
    return measured.acceptance_length - 1 < SUSPICIOUS_SHARE * (simulated - 1)


class Diagnostician:
    """Tries changes on the answers of a verifier.

    Args:
        source: The draft.
        verifier: Its verifier, with hooks for `neighbours` of the draft's layers.
        hooked: The layers with hooks, ascending.
        config: Of the verifier.
        num_draft_tokens: Tokens of a chain.
        seed: Of the intervals.
    """

    def __init__(
        self,
        source: TrainedDraft,
        verifier: LoadedVerifier,
        hooked: Sequence[int],
        config: VerifierConfig,
        *,
        num_draft_tokens: int,
        seed: int,
    ) -> None:
        self._source = source
        self._verifier = verifier
        self._hooked = tuple(hooked)
        self._config = config
        self._num_draft_tokens = num_draft_tokens
        self._seed = seed

    def diagnose(
        self,
        pairs: Sequence[tuple[Sequence[int], Answer]],
        tried: Sequence[Cause] = (),
    ) -> Diagnosis | None:
        """Rank causes; None if no answer is long enough.

        Args:
            pairs: Prompts and answers.
            tried: Causes that were tried elsewhere, to be ranked among the others.
        """
        self._verifier.rows.select_layers(self._hooked)
        forced = force_answers(self._verifier.rows, pairs, self._num_draft_tokens)
        if not forced:
            return None
        ids = self._source.config.target_layer_ids
        base = self._draft(_Variant("", "", self._source, ids), forced)
        causes = [
            self._weigh(variant.name, variant.change, self._draft(variant, forced), base)
            for variant in self._variants()
        ]
        causes += [
            *self._without_rare_tokens(forced, base),
            *self._within_trained_length(forced, base),
            *tried,
        ]
        causes.sort(key=lambda cause: (cause.is_real, cause.gain), reverse=True)
        checkpoint = self._source.checkpoint
        metrics = {} if checkpoint is None else checkpoint.state.metrics
        return Diagnosis(_length(base), metrics.get("acceptance_length"), tuple(causes))

    def _variants(self) -> Iterator[_Variant]:
        source, config = self._source, self._source.config
        ids = config.target_layer_ids
        for shift in (-1, 1):
            shifted = tuple(k + shift for k in ids)
            if set(shifted) <= set(self._hooked):
                listed = ",".join(map(str, shifted))
                yield _Variant("layer ids", f"aux layers {listed}", source, shifted)
        for name, value in source.algorithm.fixed_settings(config).items():
            is_switch = isinstance(value, bool) and hasattr(config, name)
            changes: dict[str, Any] = {name: not value} if is_switch else {}
            flipped = replace(config, **changes)
            if flipped != config and flipped.tensor_shapes() == config.tensor_shapes():
                change = f"`{name}` {'off' if value else 'on'}"
                yield _Variant(name, change, replace(source, config=flipped), ids)
        for what, rope in self._ropes():
            changed = replace(source, config=replace(config, rope_parameters=rope))
            yield _Variant("rope", what, changed, ids)
        own = source.embedding
        if own is not None and not _is_close(own, self._verifier.embedding):
            change = "the verifier's embedding in place of the draft's"
            yield _Variant("embedding", change, replace(source, embedding=None), ids)
        if ids[-1] == self._config.num_layers:
            change = f"final norm applied to layer {ids[-1]}"
            yield _Variant("final norm", change, source, ids, normed_layer=ids[-1])

    def _ropes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        own = dict(self._source.config.rope_parameters)
        verifiers = dict(self._config.rope_parameters)
        if own != verifiers:
            yield "RoPE of the verifier", verifiers
        plain = {"rope_type": "default", "rope_theta": PLAIN_THETA}
        if plain not in (own, verifiers):
            yield f"RoPE with theta {PLAIN_THETA:g}", plain

    def _draft(self, variant: _Variant, forced: Sequence[Forced]) -> list[Answer]:
        embedding = self._verifier.embedding
        if variant.source.embedding is not None:
            embedding = variant.source.embedding.to(embedding.device)
        drafter = variant.source.build_drafter(
            embedding, num_draft_tokens=self._num_draft_tokens, head=self._verifier.head
        )
        return draft_everywhere(drafter, forced, self._select(variant))

    def _select(self, variant: _Variant) -> Callable[[Tensor], Tensor]:
        """What a variant reads of the states of all hooked layers."""
        columns = [self._hooked.index(k) for k in variant.layer_ids]

        @torch.inference_mode()
        def select(aux: Tensor) -> Tensor:
            parts = aux.chunk(len(self._hooked), dim=-1)
            chosen = [parts[column] for column in columns]
            if variant.normed_layer is not None:
                place = variant.layer_ids.index(variant.normed_layer)
                chosen[place] = self._normed(chosen[place])
            return torch.cat(chosen, dim=-1)

        return select

    def _normed(self, states: Tensor) -> Tensor:
        config = self._config
        weight, bias = load_final_norm(VerifierFiles(config.name_or_path), config)
        normed = apply_norm(
            states.float(),
            weight.to(states.device),
            None if bias is None else bias.to(states.device),
            config.rms_norm_eps,
            is_centred=config.is_norm_centred,
        )
        return normed.to(states.dtype)

    def _without_rare_tokens(
        self, forced: Sequence[Forced], base: Sequence[Answer]
    ) -> Iterator[Cause]:
        """Chains whose tokens are all in the draft vocabulary."""
        if self._source.vocab_map.is_full:
            return
        t2d, length = self._source.vocab_map.t2d, self._num_draft_tokens
        kept = []
        for one, answer in zip(forced, base, strict=True):
            known = t2d[one.tokens.cpu()]
            first = one.num_prompt_tokens + 1
            kept.append([bool(known[first + i : first + i + length].all())
                         for i in range(len(answer.num_accepted))])  # fmt: skip
        share = sum(map(sum, kept)) / max(sum(map(len, kept)), 1)
        change = f"chains within the draft vocabulary only, {share:.0%} of them"
        yield from self._keep("draft vocabulary", change, base, kept)

    def _within_trained_length(
        self, forced: Sequence[Forced], base: Sequence[Answer]
    ) -> Iterator[Cause]:
        """Chains that begin within the length of the samples that it was trained on."""
        checkpoint = self._source.checkpoint
        settings = {} if checkpoint is None else checkpoint.state.settings
        limit = settings.get("data", {}).get("total_seq_len")
        if not isinstance(limit, int):
            return
        kept = [
            [one.num_prompt_tokens + 1 + i <= limit for i in range(len(answer.num_accepted))]
            for one, answer in zip(forced, base, strict=True)
        ]
        if not all(map(all, kept)):
            change = f"chains within {limit:,} tokens, the longest sequence in training, only"
            yield from self._keep("context length", change, base, kept)

    def _keep(
        self, name: str, change: str, base: Sequence[Answer], kept: Sequence[Sequence[bool]]
    ) -> Iterator[Cause]:
        pairs = [
            (answer, [count for count, is_kept in zip(answer.num_accepted, row, strict=True)
                      if is_kept])
            for answer, row in zip(base, kept, strict=True)
        ]  # fmt: skip
        left = [
            (answer, replace(answer, num_accepted=tuple(counts)))
            for answer, counts in pairs
            if counts
        ]
        if left:
            before, after = zip(*left, strict=True)
            yield self._weigh(name, change, after, before)

    def _weigh(
        self, name: str, change: str, found: Sequence[Answer], base: Sequence[Answer]
    ) -> Cause:
        return weigh(name, change, found, base, seed=self._seed)


def weigh(
    name: str, change: str, found: Sequence[Answer], base: Sequence[Answer], *, seed: int
) -> Cause:
    """The gain of a change, prompt by prompt."""
    length = _length(found)
    return Cause(
        name=name,
        change=change,
        acceptance_length=length,
        gain=length - _length(base),
        interval=difference_interval(found, base, seed=seed),
    )


def sample_rows(embedding: Tensor) -> Tensor:
    """At most 4,096 evenly spaced rows of an embedding, on the CPU in float32."""
    rows = torch.linspace(0, len(embedding) - 1, min(len(embedding), 4096)).long()
    return embedding[rows.to(embedding.device)].float().cpu()


def _length(answers: Sequence[Answer]) -> float:
    counts = [count for answer in answers for count in answer.num_accepted]
    return 1.0 + sum(counts) / max(len(counts), 1)


def _is_close(own: Tensor, verifiers: Tensor) -> bool:
    """Whether an embedding is the verifier's, up to rounding."""
    if own.shape != verifiers.shape:
        return True  # of another width: the verifier's cannot take its place
    return torch.allclose(sample_rows(own), sample_rows(verifiers), rtol=2**-6, atol=1e-3)

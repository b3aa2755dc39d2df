"""Measure how a model family's own code computes logits from last hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig

from speculators_cli.core.models.family import Family
from speculators_cli.core.models.family_code import (
    SMALL_VOCAB,
    build_small,
    model_classes,
    quietly,
)
from speculators_cli.core.models.readout import Readout, apply_logit_options, apply_norm

MORE = "has more than one norm and one LM head between its last layer and its logits"
NUM_ROWS = 8
MAX_PARAMETERS = 100_000_000  # of a small model with layers
# Both sides round in float32, for widths of up to 16,384.
TOLERANCE = 1e-5


class UnsupportedReadoutError(Exception):
    """The family's logits do not have that form; completes a sentence about the family."""


def measure_readout(family: Family) -> Readout:
    """Run the family's own model, without its layers, on random weights and hidden states.

    The names of config keys are not relied on: one family multiplies by the key that another
    divides by.

    Raises:
        UnsupportedReadoutError: The model computes something else, or cannot be run.
    """
    if family.config is None:
        raise UnsupportedReadoutError(family.problem)
    reasons: list[str] = []
    with _seeded():
        for attempt in _attempts(family):
            try:
                return _measure(family, attempt)
            except UnsupportedReadoutError:
                raise
            except Exception as error:  # noqa: BLE001 - third-party code, on any config
                reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    if not reasons:
        raise UnsupportedReadoutError("has no causal language model in transformers")
    raise UnsupportedReadoutError(
        f"cannot be measured: its own model does not run on text only ({reasons[0]})"
    )


@contextmanager
def _seeded() -> Iterator[None]:
    """Use a separate state of the random number generator."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quietly():
        torch.manual_seed(0)
        yield


@dataclass(frozen=True)
class _Attempt:
    """One way to run the family's own model."""

    model_class: Any
    config: PreTrainedConfig
    num_layers: int
    runs_rope: bool  # whether its rotary embeddings run; without layers they are unused
    keeps_rope: bool  # whether the RoPE is that of the config, which may be of an unknown type

    def build(self, *, num_layers: int, device: str = "cpu") -> nn.Module:
        """Build the model, without initialized weights."""
        model: nn.Module = build_small(
            self.model_class,
            self.config,
            num_layers=num_layers,
            device=device,
            keep_rope=self.keeps_rope,
        )
        return model


def _attempts(family: Family) -> Iterator[_Attempt]:
    """Yield ways to run the family's own model, the closest to the verifier first."""
    classes = list(model_classes(family))
    # Some families need one or two layers.
    for num_layers in (0, 1, 2):
        for runs_rope, keeps_rope in ((True, True), (False, True), (False, False)):
            for model_class, config in classes:
                yield _Attempt(model_class, config, num_layers, runs_rope, keeps_rope)


def _measure(family: Family, attempt: _Attempt) -> Readout:
    num_layers = attempt.num_layers
    if num_layers:
        shapes = attempt.build(num_layers=num_layers, device="meta")
        if sum(parameter.numel() for parameter in shapes.parameters()) > MAX_PARAMETERS:
            raise ValueError("its layers are too large")
    probe = _Probe(attempt.build(num_layers=num_layers), runs_rope=attempt.runs_rope)
    if num_layers == 0:
        _check_is_last(probe, attempt)
    return probe.fit(_floats(family))


def _floats(family: Family) -> list[float]:
    """Return the numbers in the config, the likely candidates for a measured number."""
    found: list[float] = []
    for config in family.configs:
        values = [v for v in vars(config).values() if isinstance(v, int | float)]
        found += [float(v) for v in values if 0 < abs(v) < 1e9]
    return found


class _Probe:
    """A small model whose final norm reads given hidden states.

    Args:
        model: The model, without initialized weights.
        runs_rope: Whether its rotary embeddings run; without layers they are unused.
    """

    def __init__(self, model: nn.Module, *, runs_rope: bool) -> None:
        self.model = model
        names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self.embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if getattr(self.head, "weight", None) is None or id(self.head) not in names:
            raise UnsupportedReadoutError("has no LM head that is one linear layer")
        self.embedding_name, self.head_name = names[id(self.embedding)], names[id(self.head)]
        if not runs_rope:
            for module in model.modules():
                if "Rotary" in type(module).__name__:
                    module.forward = lambda *_, **__: (None, None)
        self.is_tied = self.head.weight is self.embedding.weight
        self._fill()
        self.norm_name, self.norm, self.states = self._find_norm()

    def _fill(self) -> None:
        for parameter in self.model.parameters():
            if parameter.dim() == 1 and len(parameter) < 10**6:
                parameter.normal_(0.5, 0.3)
        for module in (self.embedding, self.head):
            module.weight.data = torch.randn(SMALL_VOCAB, module.weight.shape[1])
            if getattr(module, "bias", None) is not None:
                module.bias.data = torch.randn(SMALL_VOCAB)

    def run(self) -> Tensor:
        """Return the logits of a short text; [rows, vocab]."""
        ids = torch.arange(3, 3 + NUM_ROWS)[None]
        output = self.model(input_ids=ids, use_cache=False)
        logits: Tensor = output.logits
        return logits[0]

    def _find_norm(self) -> tuple[str, nn.Module, Tensor]:
        """Find the last norm before the LM head, and its input."""
        called: list[tuple[str, nn.Module, Tensor]] = []
        is_over = False

        def keep(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
            nonlocal is_over
            is_over = is_over or module is self.head
            if not is_over and _is_norm(module) and args and isinstance(args[0], Tensor):
                called.append((name, module, args[0]))

        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, name=name: keep(module, args, name=name)
            )
            for name, module in self.model.named_modules()
        ]
        self.run()
        for hook in hooks:
            hook.remove()
        if not is_over:
            raise UnsupportedReadoutError("computes its logits without its LM head")
        if not called:
            raise UnsupportedReadoutError("has no final norm")
        name, norm, states = called[-1]
        self.num_calls = sum(module is norm for _, module, _ in called)
        base: Any = self.model.base_model
        if not any(module is norm for module in base.modules()):
            raise UnsupportedReadoutError(MORE)
        return name, norm, states

    def _trace(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs of norm and LM head, and the logits, for these inputs of the norm."""
        seen: dict[str, Tensor] = {}
        hooks = (
            self.norm.register_forward_pre_hook(lambda _, args: (states, *args[1:])),
            self.norm.register_forward_hook(lambda *a: seen.update(norm=a[2])),
            self.head.register_forward_hook(lambda *a: seen.update(head=a[2])),
        )
        try:
            logits = self.run()
        finally:
            for hook in hooks:
                hook.remove()
        shape = (NUM_ROWS, -1)
        return seen["norm"].reshape(shape), seen["head"].reshape(shape), logits.reshape(shape)

    def fit(self, floats: list[float]) -> Readout:
        """Find the parameters that reproduce the family's logits.

        Raises:
            UnsupportedReadoutError: There are none.
        """
        if self.states.numel() != NUM_ROWS * self.head.weight.shape[1]:
            raise UnsupportedReadoutError(MORE)
        # From rows dominated by eps to rows where it is negligible.
        sizes = torch.logspace(-6, 1, NUM_ROWS)[:, None]
        states = (torch.randn(NUM_ROWS, self.head.weight.shape[1]) + 0.3) * sizes
        normed, _, logits = self._trace(states.reshape(self.states.shape))
        found = self._fit_norm(states, normed, floats)
        found = self._fit_logits(normed, found, floats)
        own = compute(found, states, self.norm, self.head)
        error = (own - logits).abs().max() / logits.abs().max()
        if not error <= TOLERANCE:
            raise UnsupportedReadoutError(MORE)
        return found

    def _fit_norm(self, states: Tensor, normed: Tensor, floats: list[float]) -> Readout:
        has_weight = getattr(self.norm, "weight", None) is not None
        for is_centred in (False, True):
            for offset in (0.0, 1.0):
                found = Readout(
                    self.embedding_name, self.norm_name if has_weight else None, self.head_name,
                    self.is_tied, is_centred, 0.0, offset, 1.0, None,
                )  # fmt: skip
                eps = _fit_eps(found, states, normed, self.norm)
                found = replace(found, eps=_snap(eps, [*_numbers(self.norm), *floats]))
                own = _norm(found, states, self.norm)
                if (own - normed).abs().max() <= TOLERANCE * normed.abs().max():
                    return found
        kind = type(self.norm).__name__
        raise UnsupportedReadoutError(
            f"has a final norm, `{kind}`, that is neither an RMSNorm nor a LayerNorm"
        )

    def _fit_logits(self, normed: Tensor, found: Readout, floats: list[float]) -> Readout:
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        plain = F.linear(normed, weight, bias)
        given = weight.data, None if bias is None else bias.data
        peak = 0.0
        for size in (1e4, 1e8):  # large enough for any soft cap
            self._scale_head(given, size)
            logits = self._logits_of(normed)
            largest = logits.abs().max().item()
            peak, is_capped = largest, peak > 0 and largest <= peak * 1.001
        softcap = _snap(peak, floats) if is_capped else None
        size = 0.01 * (softcap or 100.0) / plain.abs().max().item()
        self._scale_head(given, size)
        logits = self._logits_of(normed).double()
        self._scale_head(given, 1.0)
        if softcap is not None:
            logits = softcap * torch.atanh(logits / softcap)
        plain = plain.double() * size
        scale = ((logits * plain).sum() / (plain * plain).sum()).item()
        choices = [1.0, *floats, *(1.0 / x for x in floats)]
        return replace(found, scale=_snap(scale, choices), softcap=softcap)

    def _scale_head(self, given: tuple[Tensor, Tensor | None], size: float) -> None:
        self.head.weight.data = given[0] * size
        if given[1] is not None:
            self.head.bias.data = given[1] * size

    def _logits_of(self, normed: Tensor) -> Tensor:
        hook = self.norm.register_forward_hook(lambda *a: normed.reshape(a[2].shape))
        try:
            return self.run().reshape(NUM_ROWS, -1)
        finally:
            hook.remove()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _numbers(norm: nn.Module) -> list[float]:
    return [float(v) for v in vars(norm).values() if isinstance(v, float)]


def _snap(number: float, choices: list[float]) -> float:
    """Return the choice equal to a measured number up to rounding, or the number itself."""
    near = [x for x in choices if abs(x - number) <= 1e-3 * abs(number)]
    return min(near, key=lambda x: abs(x - number), default=number)


def _fit_eps(found: Readout, states: Tensor, normed: Tensor, norm: nn.Module) -> float:
    """Return the eps that reproduces the first, smallest row."""
    x = states[:1].double()
    x = x - x.mean(-1, keepdim=True) if found.is_centred else x
    weight, bias = norm_parameters(norm, found.offset, x.shape[-1])
    target = normed[:1].double() - bias
    x_gain = x * weight
    ratio = (target * x_gain).sum() / (x_gain * x_gain).sum()
    eps = (ratio**-2 - (x * x).mean()).item()
    return max(eps, 0.0)


def norm_parameters(norm: nn.Module, offset: float, size: int) -> tuple[Tensor, Tensor]:
    """Return the weights and bias of a norm; ones and zeros where it has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    weight = torch.ones(size) if weight is None else weight + offset
    return weight, torch.zeros(size) if bias is None else bias


def _norm(found: Readout, states: Tensor, norm: nn.Module) -> Tensor:
    weight, bias = norm_parameters(norm, found.offset, states.shape[-1])
    return apply_norm(states, weight, bias, found.eps, is_centred=found.is_centred)


def compute(found: Readout, states: Tensor, norm: nn.Module, head: Any) -> Tensor:
    """Compute logits in this form, with a model's own norm and LM head."""
    normed = _norm(found, states, norm)
    plain = F.linear(normed, head.weight, getattr(head, "bias", None))
    return apply_logit_options(plain, scale=found.scale, softcap=found.softcap)


class _ReachedError(Exception):
    """Execution has reached the first layer."""


def _check_is_last(probe: _Probe, attempt: _Attempt) -> None:
    """Check that the final norm comes after the layers in a model that has some.

    Raises:
        UnsupportedReadoutError: It comes before them, such as a norm of the embeddings.
    """
    without = {name for name, _ in probe.model.named_modules()}
    for device in ("meta", "cpu"):
        try:
            model = attempt.build(num_layers=1, device=device)
            num_before = _count_before_layers(model, probe.norm_name, without, device)
        except Exception:  # noqa: BLE001, S112 - third-party code; the next device may work
            continue
        if num_before >= probe.num_calls:
            raise UnsupportedReadoutError("has no final norm")
        return


def _count_before_layers(model: Any, norm_name: str, without: set[str], device: str) -> int:
    """Count calls of the norm before the first layer, which is a module missing in `without`."""
    calls: list[None] = []

    def stop(*_: object) -> None:
        raise _ReachedError

    hooks = [
        module.register_forward_pre_hook(
            (lambda *_: calls.append(None)) if name == norm_name else stop
        )
        for name, module in model.named_modules()
        if name == norm_name or name not in without
    ]
    try:
        model(input_ids=torch.arange(3, 3 + NUM_ROWS, device=device)[None], use_cache=False)
    except _ReachedError:
        return len(calls)
    finally:
        # Some families share modules, such as an activation, between all of their models.
        for hook in hooks:
            hook.remove()
    raise RuntimeError("no layer was reached")

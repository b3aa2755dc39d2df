"""The best epoch of a run, and how long ago it was."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.models.train_state import TrainState
from speculators_cli.core.training.metrics import Metrics, are_finite

EVALUATED = "evaluated_acceptance_length"
_KEYS = ("acceptance_length", "loss", EVALUATED)


def describe_best(epoch: int, metrics: Metrics) -> dict[str, Any]:
    """What the state records of the best epoch."""
    values = {key: metrics.get(key) for key in _KEYS if key in metrics or key != EVALUATED}
    return {"name": str(epoch), **values}


def is_better(metrics: Metrics, best: Mapping[str, Any] | None, *, by_prompts: bool) -> bool:
    """Whether an epoch beats the best one so far.

    Compared by the acceptance length on prompts, if it is evaluated; then by the simulated one, if
    the algorithm has one; ties, as at the start of a run, by the loss. An epoch without a finite
    value of each is never better.
    """
    rank, best_rank = (_rank(x, by_prompts=by_prompts) for x in (metrics, best or {}))
    return rank is not None and (best_rank is None or rank > best_rank)


def count_epochs_since_best(state: TrainState) -> int:
    """Finished epochs after the best one; all of them if there is none."""
    best = -1 if state.best is None else int(state.best["name"])
    return max(state.epoch - 1 - best, 0)


def _rank(metrics: Mapping[str, Any], *, by_prompts: bool) -> tuple[float, ...] | None:
    """Sort key of an epoch; None if a metric is missing or not finite."""
    length, loss = metrics.get("acceptance_length"), metrics.get("loss")
    simulated = (0.0 if length is None else length, 0.0 if loss is None else -loss)
    if not are_finite(*simulated):
        return None
    if not by_prompts:
        return None if loss is None else simulated
    evaluated = metrics.get(EVALUATED)
    if evaluated is None or not are_finite(evaluated):
        return None
    return (evaluated, *simulated)

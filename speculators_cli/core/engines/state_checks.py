"""Checks of the first captured states: silent mistakes of an engine cost a whole run."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.errors import MachineError
from speculators_cli.core.models.verifier import FrozenVerifier

# Rounding moves the top-1 token where two are nearly equal: at 0.2 % of the positions in bfloat16.
MIN_AGREEMENT = 0.9
HINT = "Try the other `--engine`, and report the verifier"


def check_layers(states: CapturedStates, layer_ids: Sequence[int]) -> None:
    """Check that no layer is zero, the same for all tokens, or a copy of another.

    Raises:
        MachineError: One is.
    """
    size = states.last.shape[1]
    layers = states.aux.float().split(size, dim=1)
    for layer_id, layer in zip(layer_ids, layers, strict=True):
        if not layer.any():
            raise MachineError(f"The captured states of layer {layer_id} are zero", hint=HINT)
        if len(layer) > 1 and bool((layer == layer[0]).all()):
            raise MachineError(
                f"The captured states of layer {layer_id} are the same for all tokens", hint=HINT
            )
    for index, layer in enumerate(layers):
        for other in range(index):
            if torch.equal(layer, layers[other]):
                raise MachineError(
                    f"The captured states of layers {layer_ids[other]} and {layer_ids[index]} are "
                    "equal",
                    hint=HINT,
                )


def check_head(
    packed: Packed,
    states: CapturedStates,
    verifier: FrozenVerifier,
    logits_of: Callable[[Tensor], Tensor],
) -> float:
    """Check that norm and LM head, over captured last states, predict what the verifier does.

    Args:
        packed: The documents; the first one with last hidden states is checked.
        states: Their states.
        verifier: The parts that a training run reads.
        logits_of: Computes the verifier's own logits of a document.

    Returns:
        Top-1 agreement.

    Raises:
        MachineError: They predict other tokens.
    """
    start = 0
    for length in packed.lengths:
        is_own = (packed.rows >= start) & (packed.rows < start + length)
        if is_own.any():
            break
        start += length
    rows = packed.rows[is_own]
    last = states.last[is_own.to(states.last.device)]
    expected = logits_of(packed.input_ids[start : start + length])[rows - start].argmax(-1)
    head = verifier.to(last.device)
    is_normed = torch.zeros(len(last), dtype=torch.bool, device=last.device)
    found = head.tokens(head.normed(last, is_normed))
    agreement = float((found == expected.to(found.device)).float().mean())
    if agreement < MIN_AGREEMENT:
        raise MachineError(
            f"The LM head over captured last hidden states predicts the verifier's own token at "
            f"{agreement:.1%} of {len(rows):,} positions, expected nearly all",
            hint=HINT,
        )
    return agreement

"""Joint attention over TTT steps, against its definition."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.attention import TTTMemory

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 4
# float32 keeps 24 bits; sums of a dozen terms lose a few of them.
RTOL, ATOL = 1e-5, 1e-6


def by_definition(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    document_ids: Tensor,
    window: float = torch.inf,
) -> Tensor:
    """Output of the last TTT step, position by position and head by head, in float64."""
    num_steps, seq_len = keys.shape[:2]
    last = num_steps - 1
    out = torch.zeros_like(queries, dtype=torch.float64)
    for i in range(seq_len):
        before = [j for j in range(i + 1) if document_ids[j] == document_ids[i]]
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            near = [(0, j) for j in before] + [(step, i) for step in range(1, num_steps)]
            # In an engine, step m at i stands at position i + m.
            seen = [(step, j) for step, j in near if (i + last) - (j + step) < window]
            k = torch.stack([keys[step, j, group] for step, j in seen]).double()
            v = torch.stack([values[step, j, group] for step, j in seen]).double()
            scores = k @ queries[i, head].double() / HEAD_DIM**0.5
            out[i, head] = scores.softmax(0) @ v
    return out


def run_steps(
    lengths: tuple[int, ...], seq_len: int, num_steps: int, window: int | None = None
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    queries = torch.randn(num_steps, seq_len, HEADS, HEAD_DIM)
    keys, values = torch.randn(2, num_steps, seq_len, KV_HEADS, HEAD_DIM)
    memory = TTTMemory(lengths, window)
    outputs = [memory.attend(*qkv) for qkv in zip(queries, keys, values, strict=True)]
    return queries, keys, values, torch.stack(outputs)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_each_step_equals_its_definition_on_packed_documents(step: int) -> None:
    queries, keys, values, outputs = run_steps((5, 3), seq_len=10, num_steps=3)
    document_ids = torch.tensor([0] * 5 + [1] * 3 + [-1] * 2)

    expected = by_definition(queries[step], keys[: step + 1], values[: step + 1], document_ids)

    torch.testing.assert_close(outputs[step].double(), expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("block", [1, 3, 1024])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 8, 9])
def test_windowed_steps_equal_their_definition(
    window: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators_cli.core.algorithms.eagle3.attention.MIN_BLOCK", block)
    queries, keys, values, outputs = run_steps((9, 4), seq_len=15, num_steps=4, window=window)
    document_ids = torch.tensor([0] * 9 + [1] * 4 + [-1] * 2)

    for step in range(4):
        expected = by_definition(
            queries[step], keys[: step + 1], values[: step + 1], document_ids, window
        )
        torch.testing.assert_close(outputs[step].double(), expected, rtol=RTOL, atol=ATOL)


def test_a_window_of_the_longest_document_is_none() -> None:
    # The query of step 2 stands two positions on.
    *_, full = run_steps((9, 4), seq_len=15, num_steps=3)
    *_, whole = run_steps((9, 4), seq_len=15, num_steps=3, window=11)
    *_, shorter = run_steps((9, 4), seq_len=15, num_steps=3, window=8)

    assert torch.equal(whole, full)
    assert not torch.equal(shorter[0, :9], full[0, :9])
    assert torch.equal(shorter[:, 9:13], full[:, 9:13])


def test_packed_documents_with_a_window_are_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speculators_cli.core.algorithms.eagle3.attention.MIN_BLOCK", 2)
    queries, keys, values, packed = run_steps((9, 4), seq_len=13, num_steps=3, window=4)
    memory = TTTMemory((4,), window=4)

    alone = [
        memory.attend(*(x[9:] for x in qkv)) for qkv in zip(queries, keys, values, strict=True)
    ]

    assert torch.equal(packed[:, 9:], torch.stack(alone))


def test_a_document_does_not_see_its_neighbours() -> None:
    memory = TTTMemory((4, 6))
    torch.manual_seed(1)
    query, other_query = torch.randn(2, 10, HEADS, HEAD_DIM)
    key, value, other_key, other_value = torch.randn(4, 10, KV_HEADS, HEAD_DIM)
    other_query[4:], other_key[4:], other_value[4:] = query[4:], key[4:], value[4:]

    out = memory.attend(query, key, value)
    other_out = TTTMemory((4, 6)).attend(other_query, other_key, other_value)

    assert torch.equal(out[4:], other_out[4:])
    assert not torch.equal(out[:4], other_out[:4])


def test_a_later_token_does_not_change_earlier_outputs() -> None:
    torch.manual_seed(2)
    query = torch.randn(7, HEADS, HEAD_DIM)
    key, value = torch.randn(2, 7, KV_HEADS, HEAD_DIM)
    changed = key.clone()
    changed[5] += 1.0

    out = TTTMemory((7,)).attend(query, key, value)
    other = TTTMemory((7,)).attend(query, changed, value)

    assert torch.equal(out[:5], other[:5])
    assert not torch.equal(out[5:], other[5:])


@pytest.mark.parametrize("window", [None, 2])
def test_gradients_equal_those_of_float64(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators_cli.core.algorithms.eagle3.attention.MIN_BLOCK", 3)
    torch.manual_seed(3)
    query = torch.randn(6, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 6, KV_HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)

    def attend(query: Tensor, keys: Tensor) -> Tensor:
        memory = TTTMemory((4, 2), window)
        memory.attend(query, keys[0], keys[0])
        return memory.attend(query, keys[1], keys[1])

    # The softmax runs in float32, so finite differences are only this good.
    assert torch.autograd.gradcheck(attend, (query, keys), eps=1e-2, atol=1e-2, rtol=1e-2)

"""Lengths of the documents in synthetic packed sequences."""

import pytest
import torch

from speculators_cli.core.bench.synthetic import document_lengths


@pytest.mark.parametrize(
    ("num_documents", "lengths"),
    [
        (None, [80, 112, 144, 176, 224, 288]),
        (1, [1024]),
        (3, [341, 341, 342]),
    ],
)
def test_documents_fill_the_sequence(num_documents: int | None, lengths: list[int]) -> None:
    found = document_lengths(1024, num_documents, torch.Generator().manual_seed(0))

    assert sorted(found) == lengths

"""Whether a way to compute a verifier has the results of its own forward pass."""

import torch
from torch import Tensor

# Relative, over random tokens. A sequence that sees another one differs by far more.
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
CHECKED_TOKENS = (24, 40)  # of the two sequences


def median_error(found: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of the relative error.

    A median: the routing of a few tokens of a mixture of experts may flip by rounding.
    """
    difference = (found.float() - expected.float()).norm(dim=-1)
    return float((difference / expected.float().norm(dim=-1).clamp(min=1e-6)).median())

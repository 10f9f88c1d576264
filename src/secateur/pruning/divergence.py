"""How far one distribution over tokens is from another."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(own_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Return KL(own || other) for each row of log-probabilities, in nats, [T], float64.

    >>> divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438], dtype=torch.float64)
    """
    weight_TV = own_TV.exp()
    return torch.where(weight_TV > 0, weight_TV * (own_TV - other_TV), 0).sum(-1, dtype=torch.float64)

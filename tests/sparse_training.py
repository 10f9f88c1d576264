"""Steps of training, and a look at zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IDS = torch.arange(3, 3 + 4 * 16).reshape(4, 16)


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor = IDS) -> float:
    optimizer.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def zeros(model: Any) -> dict[str, Tensor]:
    """Where the weights of all matrices are +0.0."""
    return {
        name: parameter.detach().clone().contiguous().view(torch.int32) == 0
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim > 1
    }


def same_zeros(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

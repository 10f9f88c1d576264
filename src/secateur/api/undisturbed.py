"""The door from a caller's program into ours: settings stay outside, and paths become names."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute outside of its caller's autocast, inference mode, `no_grad` and default device.

    All of these belong to the calling thread, and are as they were when the function returns. A `Path` may stand
    wherever the function takes a file's name by keyword.
    """

    @wraps(function)
    def calm(*args: P.args, **options: P.kwargs) -> R:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.is_inference_mode_enabled() and not any(map(_born_in_inference, (*args, *options.values()))):
                stack.enter_context(torch.inference_mode(mode=False))
            if not torch.is_grad_enabled():
                stack.enter_context(torch.enable_grad())
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            named: Any = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()}
            return function(*args, **named)

    return calm


def _born_in_inference(given: object) -> bool:
    """Whether a model was made in inference mode, outside of which its weights cannot be changed."""
    return isinstance(given, nn.Module) and any(parameter.is_inference() for parameter in given.parameters())

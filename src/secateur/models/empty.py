"""Modules made without memory for their parameters, in one thread; what other threads make stays what it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


class _Wanted(threading.local):
    """Whether this thread makes a model without memory."""

    here = False


_wanted = _Wanted()


@contextmanager
def without_parameters() -> Iterator[None]:
    """Put the parameters of modules that this thread makes for a while on the meta device; buffers are real."""
    former, _wanted.here = _wanted.here, True
    try:
        yield
    finally:
        _wanted.here = former


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not _wanted.here or parameter.device.type == "meta":
        return None
    empty = nn.Parameter(parameter.data.to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty


# Installed once and for good: adding and removing it each time would disturb threads that make modules meanwhile.
register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]

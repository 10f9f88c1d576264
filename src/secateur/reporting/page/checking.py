"""Whether recorded data holds what its shape says."""

from __future__ import annotations

from typing import Any

from ...errors import DataError


def check(value: Any, shape: Any, where: str) -> None:
    """Compare recorded data with what it must hold.

    Args:
        value: recorded data.
        shape: a type or several; a list of one shape; a dict of shapes by key, of which ``*`` stands for every key;
            or a function that tells the shape from the value.
        where: file and place, for the error.

    Raises:
        DataError: something is missing or of another type.
    """
    if callable(shape) and not isinstance(shape, type):
        shape = shape(value)
    kind: Any = type(shape) if isinstance(shape, (dict, list)) else shape
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where} is {type(value).__name__}, which does not belong there; the file is damaged")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if key == "*":
                for other, item in value.items():
                    check(item, inner, f"{where}: {other[:80]}")
            elif value.get(name) is not None:
                check(value[name], inner, f"{where}: {name}")
            elif name == key:
                raise DataError(f"{where}: {name} is missing; the file is damaged")

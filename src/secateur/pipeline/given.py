"""Rows of tokens for what Python code hands over as it is: strings, tensors, a tokenizer's batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

MOST_ITEMS = 2048  # that are looked at of an iterable that may have no end


def given_rows(calibration: Any, tokenizer: Any, longest: int | None) -> tuple[str, list[Tensor]] | None:
    """Rows for what Python code may hand over as it is; None for sources and records."""
    if isinstance(calibration, str):
        return None
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or not _whole(calibration):
            raise DataError(
                f"calibration: a tensor must be integer ids [samples, seqlen], not {list(calibration.shape)}"
            )
        return "the given tensor", list(calibration.long().cpu())
    if isinstance(calibration, Mapping) and "input_ids" in calibration:
        return "the given batch", _batch_rows(calibration["input_ids"], calibration.get("attention_mask"))
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise DataError(
            f"calibration: cannot use a {type(calibration).__name__}; give a source's name, strings or token ids"
        )
    peek = calibration if isinstance(calibration, (list, tuple)) else None
    if peek is None:
        if hasattr(calibration, "column_names"):
            return None
        peek = list(islice(calibration, MOST_ITEMS))
    if not peek:
        raise DataError("calibration: is empty")
    if all(isinstance(item, str) for item in peek):
        tokenizer = need(tokenizer, "the given strings")
        ids = [torch.tensor(encode(tokenizer, text, "the given strings"), dtype=torch.long) for text in peek]
        return "the given strings", [row[:longest] for row in ids]
    if all(isinstance(item, Tensor) for item in peek):
        if not all(_whole(item) for item in peek):
            raise DataError("calibration: tensors must be integer ids, not floats")
        return "the given tensors", [item.reshape(-1).long().cpu() for item in peek]
    if peek is calibration:
        return None
    raise DataError("calibration: the items are neither strings nor tensors; give records as a list")


def _batch_rows(ids: Any, mask: Any) -> list[Tensor]:
    """The rows of a tokenizer's batch, without the positions that its mask leaves out."""
    unfit = DataError("the given batch: its input_ids are no rows of whole numbers, or its mask does not fit them")
    try:
        if not isinstance(ids, Tensor) and len(ids) and isinstance(ids[0], int):  # one text, not in a list
            ids, mask = [ids], None if mask is None else [mask]
        rows = [row if isinstance(row, Tensor) else torch.tensor(row) for row in ids]
        if mask is not None:
            rows = [row[torch.as_tensor(m).bool()] for row, m in zip(rows, mask, strict=True)]
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, RuntimeError):
        raise unfit from None
    if any(row.ndim != 1 or (len(row) and not _whole(row)) for row in rows):
        raise unfit
    return [row.long().cpu() for row in rows]


def _whole(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def encode(tokenizer: Any, text: str, what: str, *, special: bool = True) -> list[int]:
    """Tokenise one text; DataError if it is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what}: a text holds half of a surrogate pair, which is no character") from None
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def need(tokenizer: Any, what: str) -> Any:
    """Return the tokenizer; DataError if there is none."""
    if tokenizer is None:
        raise DataError(
            f"{what}: text needs a tokenizer and the model has none that can be opened; give one, or rows of input_ids"
        )
    return tokenizer

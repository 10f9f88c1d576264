"""Rows of tokens for what Python code hands over as it is: strings, tensors, a tokenizer's batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

MOST_ITEMS = 2048  # that are looked at of an iterable that may have no end


def given_rows(given: Any, tokenizer: Any, longest: int | None, option: str) -> tuple[str, list[Tensor]] | None:
    """Rows for what Python code may hand over as it is under an option's name; None for sources and records."""
    if isinstance(given, str):
        return None
    if isinstance(given, Tensor):
        if given.ndim != 2 or not _whole(given):
            raise DataError(f"{option}: a tensor must be integer ids [samples, seqlen], not {list(given.shape)}")
        return "the given tensor", list(given.long().cpu())
    if isinstance(given, Mapping) and "input_ids" in given:
        return "the given batch", _batch_rows(given["input_ids"], given.get("attention_mask"))
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise DataError(f"{option}: cannot use a {type(given).__name__}; give a source's name, strings or token ids")
    peek = given if isinstance(given, (list, tuple)) else None
    if peek is None:
        if hasattr(given, "column_names"):
            return None
        peek = list(islice(given, MOST_ITEMS))
    if not peek:
        raise DataError(f"{option}: is empty")
    if all(isinstance(item, str) for item in peek):
        tokenizer = need(tokenizer, "the given strings")
        ids = [torch.tensor(encode(tokenizer, text, "the given strings"), dtype=torch.long) for text in peek]
        return "the given strings", [row[:longest] for row in ids]
    if all(isinstance(item, Tensor) for item in peek):
        if not all(_whole(item) for item in peek):
            raise DataError(f"{option}: tensors must be integer ids, not floats")
        return "the given tensors", [item.reshape(-1).long().cpu() for item in peek]
    if peek is given:
        return None
    raise DataError(f"{option}: the items are neither strings nor tensors; give records as a list")


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

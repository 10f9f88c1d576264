"""What Python code hands over -> strings or records: tensors, batches, loaders, data sets, tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError
from .records import IGNORED, LABELS, MASK, Corpus, absent, described, from_records, shown
from .sources import read_source

log = logging.getLogger("secateur")

MOST_ITEMS = 2048  # that are looked at of an iterable that may have no end
ARRAYS = (Tensor, np.ndarray)


def read_data(given: Any, option: str, characters: int, most: int | None, *, labels: bool = False) -> Corpus:
    """Return the corpus of a SOURCE, or of whatever Python code hands over in its place.

    Args:
        given: a source's name, a path, or data.
        option: under whose name it was given, for messages.
        characters: about how many are wanted from a source too large to be read whole.
        most: items to be taken of an iterable that may have no end; None is all.
        labels: whether what is learnt of rows of token ids is to be told from what is not.

    Raises:
        DataError: it cannot be used.
    """
    if isinstance(given, (str, os.PathLike)):
        return read_source(os.fsdecode(given), "train", characters, labels=labels)
    name, items = _items(given, option, most)
    if isinstance(items, list):
        there = [item for item in items if not (isinstance(item, (float, type(None))) and absent(item))]
        if all(isinstance(item, str) for item in there):
            if not there:
                raise DataError(f"{option}: is empty")
            if len(there) < len(items):
                log.warning("%s: %d of %d are null and are skipped", option, len(items) - len(there), len(items))
            return Corpus(name, there, apart=True)
        items = [_record(item, f"{option}: item {number}") for number, item in enumerate(items, 1)]
    return from_records(items, name, labels=labels)


def _items(given: Any, option: str, most: int | None) -> tuple[str, Iterable[Any]]:
    """What is given as a list, or as a data set that gives records, and what it is called."""
    if isinstance(given, ARRAYS) and _is_numeric(given):
        if given.ndim != 2 or not _whole(given):
            raise DataError(f"{option}: a tensor must be integer ids [samples, seqlen], not {described(given)}")
        return "the given tensor", [{"input_ids": given}]
    if isinstance(given, Mapping):
        return "the given batch", [_batch(given, option)]
    if (table := _table(given)) is not None:
        return "the given records", table
    if hasattr(given, "column_names"):  # a data set of the datasets library
        return "the given records", given
    if isinstance(given, (list, tuple)):
        items = list(given)
    elif isinstance(given, Iterable) and not isinstance(given, bytes):
        items = list(islice(given, most))
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, bytes):
        items = [given[index] for index in range(len(given) if most is None else min(len(given), most))]
    else:
        raise DataError(f"{option}: cannot use {described(given)}; give a source's name, strings or token ids")
    if not items:
        raise DataError(f"{option}: is empty")
    if len(items) == most and not isinstance(given, (list, tuple)):
        log.info("%s: the first %d items are read", option, most)
    tensors = all(isinstance(item, Tensor) for item in items)
    return "the given tensors" if tensors else "the given records", items


def _batch(given: Mapping[str, Any], option: str) -> Mapping[str, Any]:
    """A tokenizer's batch; what is none is refused by what it holds."""
    if "input_ids" in given:
        return given
    names = ", ".join(map(shown, given))[:120]
    if given and all(hasattr(part, "column_names") for part in given.values()):
        raise DataError(f"{option}: has the splits {names}; give one of them, such as data[{next(iter(given))!r}]")
    raise DataError(f"{option}: cannot use a {type(given).__name__} of {names or 'nothing'}; give a list of records")


def _table(given: Any) -> list[Any] | None:
    """The rows of a table, or the values of one of its columns, of pandas, polars or pyarrow; None for others."""
    library = type(given).__module__.partition(".")[0]
    for way in ("to_pylist", "to_dicts", "to_list"):  # of pyarrow, and of a frame and a series of polars
        if library in ("pyarrow", "polars") and hasattr(given, way):
            return list(getattr(given, way)())
    if library != "pandas" or not hasattr(given, "notna"):
        return None
    there = given.astype(object).where(given.notna(), None)
    return list(there.to_dict("records") if given.ndim == 2 else there.tolist())


def _record(item: Any, where: str) -> Any:
    """One item as a record: token ids, or the tuple of inputs and targets that other scripts make."""
    if isinstance(item, ARRAYS):
        return {"input_ids": _ids(item, where)}
    if not isinstance(item, (list, tuple)) or not any(isinstance(part, ARRAYS) and part.ndim for part in item):
        return item
    record = {"input_ids": _ids(item[0], where)}
    for beside in item[1:]:
        if (name := _beside(item[0], beside)) in record:
            raise DataError(f'{where}: is {described(item)}, two of them {name}; give {{"input_ids": …}} instead')
        record[name] = beside
    return record


def _beside(ids: Any, beside: Any) -> str:
    """What stands beside token ids: a mask of zeros and ones, labels, or targets that nobody here reads."""
    if not isinstance(beside, ARRAYS) or beside.shape != ids.shape or not _whole(beside):
        return "targets"
    first, second = (np.asarray(part.cpu() if isinstance(part, Tensor) else part) for part in (ids, beside))
    if ((second == 0) | (second == 1)).all():
        return MASK
    return LABELS if ((second == IGNORED) | (second == first)).all() else "targets"


def _ids(item: Any, where: str) -> Any:
    if not isinstance(item, ARRAYS) or item.ndim not in (1, 2) or not _whole(item):
        raise DataError(f"{where}: must be integer ids [tokens] or [rows, tokens], and is {described(item)}")
    return item


def _is_numeric(given: Any) -> bool:
    """Whether an array holds numbers; one of strings is a list of them."""
    return isinstance(given, Tensor) or given.dtype.kind in "biufc"


def _whole(given: Any) -> bool:
    if isinstance(given, Tensor):
        return not given.is_floating_point() and not given.is_complex()
    return bool(given.dtype.kind in "biu")


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

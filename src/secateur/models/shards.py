"""Safetensors shards as files: tensors read and written one by one, packed or not.

The safetensors library maps whole shards, and mapped pages count as memory; this module reads and writes
only the bytes of the tensors that are asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError, NumericsError, OutputError, unwritable
from .formats import DTYPES as FLOATS
from .formats import VALUES, Packing, check, unpack

POINTER = b"version https://git-lfs"
COPY_BYTES = 8 << 20
MAX_HEADER_BYTES = 100 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where one tensor lies: its shard and the bytes in it."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


class PackedInfo(NamedTuple):
    """Where the parts of one packed matrix lie; to the reader it is the parameter that it was."""

    name: str
    packing: Packing
    parts: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        """The shard of its values."""
        return self.parts[VALUES].path

    @property
    def begin(self) -> int:
        """The first byte of its values."""
        return self.parts[VALUES].begin

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return FLOATS[self.packing.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter in the model."""
        rows, columns = self.packing.shape
        return (columns, rows) if self.packing.transposed else (rows, columns)

    @property
    def weights(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return self.packing.bytes


Info = TensorInfo | PackedInfo


def with_packed(tensors: Mapping[str, TensorInfo], packings: Mapping[str, Packing]) -> dict[str, Info]:
    """Put the parts of packed matrices together.

    Raises:
        ModelError: a part is missing, or has another dtype or length than its packing says.
    """
    found: dict[str, Info] = dict(tensors)
    packed: dict[str, Info] = {}
    for name, packing in packings.items():
        parts: dict[str, TensorInfo] = {}
        for suffix, (dtype, length) in packing.parts.items():
            info = tensors.get(name + suffix)
            if info is None or info.dtype != dtype or info.shape != (length,):
                raise ModelError(
                    f"{name}{suffix}: is missing, or not the {length} values of {dtype} that config.json tells; pack "
                    "or download the model again"
                )
            parts[suffix] = info
            if found.pop(name + suffix, None) is None:
                raise ModelError(f"{name}{suffix}: belongs to two packed matrices; pack or download the model again")
        packed[name] = PackedInfo(name, packing, parts)
    return found | packed


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata of one safetensors file, every offset checked.

    Raises:
        ModelError: the file is truncated, or its header does not describe it.
    """

    def lie(why: str) -> ModelError:
        return ModelError(f"{path}: not a sound safetensors file ({why}); download or convert the model again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(len(POINTER))
            if first == POINTER:
                raise ModelError(f"{path}: a pointer of Git LFS in place of the file; fetch it with: git lfs pull")
            file.seek(8)
            length = int.from_bytes(first[:8], "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise lie("the header is cut off")
            header = json.loads(file.read(length).decode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); is the download complete?") from None
    except (ValueError, RecursionError):
        raise lie("the header is not JSON") from None
    if not isinstance(header, dict):
        raise lie("the header is no table")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise lie("the metadata is no table of texts")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            dtype = DTYPES[entry["dtype"]]
            shape = tuple(operator.index(n) for n in entry["shape"])
            begin, end = (operator.index(n) for n in entry["data_offsets"])
            name.encode()
        except (KeyError, TypeError, ValueError):
            raise lie(f"tensor {name!r} has an unknown dtype or no shape or offsets") from None
        if not 0 <= begin <= end <= size or not all(0 <= n < 2**63 for n in shape):
            raise lie(f"tensor {name!r} lies outside the file")
        if end - begin != math.prod(shape) * dtype.itemsize or math.prod(max(n, 1) for n in shape) >= 2**60:
            raise lie(f"tensor {name!r} does not have the bytes of its shape")
        tensors[name] = TensorInfo(path, dtype, shape, 8 + length + begin, 8 + length + end)
    position = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise lie(f"tensor {name!r} overlaps another or leaves a gap")
        position = info.end
    if position != size:
        raise lie(f"{size - position} bytes too {'many' if size > position else 'few'}")
    return tensors, metadata


def read_parts(info: PackedInfo) -> dict[str, Tensor]:
    """Read the parts of a packed matrix.

    Raises:
        ModelError: the file ends too early, or they are not what was packed.
    """
    parts = {suffix: read_tensor(part) for suffix, part in info.parts.items()}
    check(info.name, info.packing, parts)
    return parts


def read_tensor(info: Info) -> Tensor:
    """Read one tensor into memory of its own, a packed one unpacked.

    Raises:
        ModelError: the file ends too early, or a packed matrix is not what was packed.
    """
    if isinstance(info, PackedInfo):
        W_OI = unpack(info.packing, read_parts(info))
        return W_OI.T.contiguous() if info.packing.transposed else W_OI
    if info.begin == info.end:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")  # whatever the default device is
    buffer = bytearray(info.end - info.begin)
    with _opened(info.path) as file:
        file.seek(info.begin)
        if file.readinto(buffer) != len(buffer):
            raise ModelError(f"{info.path}: cut off while being read")
    return torch.frombuffer(buffer, dtype=info.dtype).view(info.shape)


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); is it still there?") from None


class Entry(NamedTuple):
    """One tensor to be written: its name, dtype and shape, and its bytes in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes | memoryview]]


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor in memory."""
    data = tensor.detach().cpu().contiguous()

    def pieces() -> Iterator[memoryview]:
        if data.numel():
            yield data.view(-1).view(torch.uint8).numpy().data

    return Entry(name, data.dtype, tuple(data.shape), pieces)


def packed_entries(info: PackedInfo) -> list[Entry]:
    """The entries that copy a packed matrix from another file."""
    return [copied_entry(info.name + suffix, part) for suffix, part in info.parts.items()]


def copied_entry(name: str, info: Info, dtype: torch.dtype | None = None) -> Entry:
    """An entry that copies a tensor's bytes from another file, unpacks it, or casts it if it is a float."""
    if isinstance(info, PackedInfo):
        dtype = dtype or info.dtype

        def unpacked() -> Iterator[bytes | memoryview]:
            yield from tensor_entry(name, read_tensor(info).to(dtype)).pieces()

        return Entry(name, dtype, info.shape, unpacked)
    if dtype is not None and info.dtype.is_floating_point and info.dtype != dtype:

        def cast() -> Iterator[bytes | memoryview]:
            tensor = read_tensor(info)
            new = tensor.to(dtype)
            if torch.isfinite(tensor).all() and not torch.isfinite(new).all():
                raise NumericsError(f"{name}: does not fit {new.dtype}; use --dtype float32 or bfloat16")
            yield from tensor_entry(name, new).pieces()

        return Entry(name, dtype, info.shape, cast)

    def pieces() -> Iterator[bytes]:
        left = info.end - info.begin
        while left:
            with _opened(info.path) as file:
                file.seek(info.end - left)
                piece = file.read(min(left, COPY_BYTES))
            if not piece:
                raise ModelError(f"{info.path}: cut off while being read")
            left -= len(piece)
            yield piece

    return Entry(name, info.dtype, info.shape, pieces)


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, one piece in memory at a time, and flush it to the disk.

    Raises:
        OutputError: the disk refuses; the half-written file is removed.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                for piece in entry.pieces():
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"{path}: {unwritable(error)}") from error


def digest(paths: Iterable[Path], advance: Callable[[int], object] = lambda done: None) -> str:
    """Return the SHA-256 of the files' bytes, one after the other; `advance` hears of the bytes read."""
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(COPY_BYTES):
                sha.update(piece)
                advance(len(piece))
    return sha.hexdigest()

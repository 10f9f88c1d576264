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
POINTED = "a pointer of Git LFS in place of the file; fetch it with: git lfs pull"
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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BITS = {"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}  # not of every torch: only their bytes are copied
WEIGHTS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})  # what weights can be computed in


class TensorInfo(NamedTuple):
    """Where one tensor lies: its shard and the bytes in it.

    Its dtype goes by the name that safetensors has for it; `dtype` is uint8 for one that torch does not know.
    """

    path: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return DTYPES.get(self.code, torch.uint8)

    @property
    def dtype_name(self) -> str:
        """The dtype as messages name it."""
        return str(DTYPES.get(self.code, self.code)).removeprefix("torch.")

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
    def dtype_name(self) -> str:
        """The dtype as messages name it."""
        return self.packing.dtype

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


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in its place until it is fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """Raise ModelError if a file of a model is a pointer of Git LFS."""
    if is_lfs_pointer(path):
        raise ModelError(f"{path}: {POINTED}")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata of one safetensors file, every offset checked.

    Raises:
        ModelError: the file is truncated, or its header does not describe it.
    """

    def lie(why: str) -> ModelError:
        return ModelError(f"{path}: not a sound safetensors file ({why}); download or convert the model again")

    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise lie("the header is cut off")
            header = json.loads(file.read(length).decode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); is the download complete?") from None
    except (ValueError, RecursionError):
        raise lie("the header is not JSON") from None
    if not isinstance(header, dict):
        raise lie("the header is no table")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise lie("the metadata is no table of texts")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            code = entry["dtype"]
            bits = BITS[code] if code in BITS else 8 * DTYPES[code].itemsize
            shape = tuple(operator.index(n) for n in entry["shape"])
            begin, end = (operator.index(n) for n in entry["data_offsets"])
            name.encode()
        except (KeyError, TypeError, ValueError):
            raise lie(f"tensor {name!r} has an unknown dtype or no shape or offsets") from None
        if not 0 <= begin <= end <= size or not all(0 <= n < 2**63 for n in shape):
            raise lie(f"tensor {name!r} lies outside the file")
        if 8 * (end - begin) != math.prod(shape) * bits or math.prod(max(n, 1) for n in shape) >= 2**60:
            raise lie(f"tensor {name!r} does not have the bytes of its shape")
        tensors[name] = TensorInfo(path, code, shape, 8 + length + begin, 8 + length + end)
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

    It is torch's memory, which begins at a multiple of 64 bytes: the last bits of a product depend on that.

    Raises:
        ModelError: the file ends too early, its dtype is none of torch's, or a packed matrix is not what was packed.
    """
    if isinstance(info, PackedInfo):
        W_OI = unpack(info.packing, read_parts(info))
        return W_OI.T.contiguous() if info.packing.transposed else W_OI
    if info.code in BITS:
        raise ModelError(
            f"{info.path}: a tensor is {info.code}, in which nothing can be computed; use the 16-bit model"
        )
    if info.begin == info.end:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")  # whatever the default device is
    tensor = torch.empty(info.shape, dtype=info.dtype, device="cpu")
    with _opened(info.path) as file:
        file.seek(info.begin)
        if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != info.bytes:
            raise ModelError(f"{info.path}: cut off while being read")
    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); is it still there?") from None


class Entry(NamedTuple):
    """One tensor to be written: its name, dtype (as safetensors names it), shape, bytes, and these in pieces."""

    name: str
    code: str
    shape: tuple[int, ...]
    size: int
    pieces: Callable[[], Iterator[bytes | memoryview]]


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor in memory."""
    data = tensor.detach().cpu().contiguous()

    def pieces() -> Iterator[memoryview]:
        if data.numel():
            yield data.view(-1).view(torch.uint8).numpy().data

    return Entry(name, DTYPE_NAMES[data.dtype], tuple(data.shape), data.nbytes, pieces)


def packed_entries(info: PackedInfo) -> list[Entry]:
    """The entries that copy a packed matrix from another file."""
    return [copied_entry(info.name + suffix, part) for suffix, part in info.parts.items()]


def copied_entry(name: str, info: Info, dtype: torch.dtype | None = None) -> Entry:
    """An entry that copies a tensor's bytes from another file, unpacks it, or casts it if it is a float."""
    if isinstance(info, PackedInfo):
        dtype = dtype or info.dtype

        def unpacked() -> Iterator[bytes | memoryview]:
            yield from tensor_entry(name, read_tensor(info).to(dtype)).pieces()

        return Entry(name, DTYPE_NAMES[dtype], info.shape, info.weights * dtype.itemsize, unpacked)
    if dtype is not None and is_cast(info, dtype):

        def cast() -> Iterator[bytes | memoryview]:
            yield from tensor_entry(name, cast_whole(name, info, dtype)).pieces()

        return Entry(name, DTYPE_NAMES[dtype], info.shape, info.weights * dtype.itemsize, cast)

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

    return Entry(name, info.code, info.shape, info.bytes, pieces)


def is_cast(info: Info, dtype: torch.dtype) -> bool:
    """Whether a tensor is of another dtype that weights are cast from."""
    return info.dtype in WEIGHTS and info.dtype != dtype


def cast_whole(name: str, info: Info, dtype: torch.dtype) -> Tensor:
    """Read a tensor in another dtype.

    Raises:
        NumericsError: a number of it is too large there.
    """
    tensor = read_tensor(info)
    new = tensor.to(dtype)
    if torch.isfinite(tensor).all() and not torch.isfinite(new).all():
        raise NumericsError(f"{name}: does not fit {new.dtype}; use --dtype float32 or bfloat16")
    return new


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, one piece in memory at a time, and flush it to the disk.

    Raises:
        OutputError: the disk refuses; the half-written file is removed.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for entry in entries:
        end = offset + entry.size
        header[entry.name] = {"dtype": entry.code, "shape": list(entry.shape), "data_offsets": [offset, end]}
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

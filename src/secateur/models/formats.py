"""Formats of one packed matrix: `bitmask` and `nm`, on disk and in memory alike (docs/formats.md).

Each format is a function that packs and one that unpacks, over one layout of 1-D parts. Zero means all bits zero: -0.0
is a value and is kept, so unpacking gives back every bit.

Names: W_OI weights [out, in]; parts are named by the suffix that their tensors bear beside the weight's own name.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, NumericsError, OptionError

ROWS, COLUMNS = 4, 64  # of a tile: 32 bytes of mask, then its values, as a kernel wants them
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTEGER = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
MAX_M = 16  # also the columns of an `nm` step at most: as many whole groups as fit
TIGHT = 0.95  # of the places of an N:M pattern must hold values, or the zeros have another pattern
MAX_WEIGHTS = 1 << 40

VALUES, MASK, INDEX, SCALE = "", "_mask", "_index", "_scale"
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Packing:
    """What ``config.json`` says of one packed matrix.

    Attributes:
        format: ``bitmask`` or ``nm``.
        shape: of the matrix, [out, in].
        dtype: of the weights.
        values: how values are held: as `dtype`, or ``int8`` with one scale for each row, which loses precision.
        count: number of held values.
        crc32: of all parts' bytes, in the order of `parts`.
        n, m: the pattern, for ``nm``.
        transposed: the parameter is [in, out] in the model (GPT-2's Conv1D).
    """

    format: str
    shape: tuple[int, int]
    dtype: str
    values: str
    count: int
    crc32: int = 0
    n: int | None = None
    m: int | None = None
    transposed: bool = False

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, int]]:
        """Dtype and length of every part, by suffix."""
        rows, columns = self.shape
        lossy = self.values == "int8"
        found = {VALUES: (torch.int8 if lossy else DTYPES[self.dtype], self.count)}
        if self.n is None or self.m is None:
            found[MASK] = (torch.uint8, _tiles(rows, ROWS) * _tiles(columns, COLUMNS) * ROWS * COLUMNS // 8)
        else:
            found[INDEX] = (torch.uint8, -(-self.count * _bits(self.m) // 8))
        if lossy:
            found[SCALE] = (torch.float32, rows)
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(dtype.itemsize * length for dtype, length in self.parts.values())

    @property
    def predicted_bytes(self) -> float:
        """Bytes as a formula has them: held values, and a bit for each weight or an index for each value."""
        values = self.count * (1 if self.values == "int8" else DTYPES[self.dtype].itemsize)
        return values + (self.shape[0] * self.shape[1] if self.m is None else self.count * _bits(self.m)) / 8

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``config.json``."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}

    @staticmethod
    def from_json(name: str, entry: Any) -> Packing:
        """Read an entry of ``config.json``.

        Raises:
            ModelError: it describes no matrix.
        """
        try:
            packing = Packing(**{**entry, "shape": tuple(entry["shape"])})
            pattern = [number for number in (packing.n, packing.m) if number is not None]
            numbers: list[Any] = [*packing.shape, packing.count, packing.crc32, *pattern]
            nm, transposed = packing.format == "nm", entry.get("transposed", False)
            rows, columns = packing.shape
            sound = all(type(number) is int for number in numbers) and min(numbers) >= 0 and packing.m != 0
            sound = sound and (
                0 < rows * columns < MAX_WEIGHTS
                and packing.count <= (rows + ROWS) * (columns + MAX_M)
                and packing.format in ("bitmask", "nm")
                and packing.dtype in DTYPES
                and packing.values in (packing.dtype, "int8")
                and type(transposed) is bool
                and (packing.n is not None) == (packing.m is not None) == nm
            )
            if sound and packing.n is not None and packing.m is not None:
                sound = 0 < packing.n < packing.m <= MAX_M
                sound = sound and packing.count == _places(packing.shape, packing.n, packing.m)
        except (TypeError, KeyError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise ModelError(f"{name}: config.json describes no packed matrix; pack or download the model again")
        return packing


def pack(name: str, W_OI: Tensor, format: str, values: str | None = None) -> tuple[Packing, dict[str, Tensor]] | None:
    """Pack a matrix, or return None if that would not make it smaller.

    Args:
        name: for errors.
        W_OI: weights [out, in], float32, float16 or bfloat16.
        format: ``bitmask``, for any zeros, or ``nm``, for zeros in an N:M pattern with M up to 16.
        values: ``int8`` to round values to 8 bits; None keeps them exactly.

    Raises:
        OptionError: the zeros do not have the pattern that the format asks for.
    """
    dtype = str(W_OI.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        return None
    packing = Packing(format, (W_OI.shape[0], W_OI.shape[1]), dtype, values or dtype, 0)
    parts: dict[str, Tensor] = {}
    held = bits(W_OI)  # integers, since copies of 16-bit floats may change the bits of NaN
    if values == "int8":
        if not W_OI.isfinite().all():
            raise NumericsError(f"{name}: holds NaN or Inf, which 8-bit values cannot; leave out --values")
        parts[SCALE] = W_OI.float().abs().amax(1) / 127
        parts[SCALE][parts[SCALE] == 0] = 1
        held = (W_OI.float() / parts[SCALE][:, None]).round().clamp(-127, 127).to(torch.int8)
    kept = bits(W_OI) != 0
    if format == "bitmask":
        parts[VALUES], parts[MASK] = _pack_bitmask(held, kept)
    else:
        if kept.all():
            return None
        n, m = _pattern(name, kept, packing)
        packing = replace(packing, n=n, m=m)
        parts[VALUES], parts[INDEX] = _pack_nm(held, kept, n, m)
    parts[VALUES] = parts[VALUES].view(packing.parts[VALUES][0])
    packing = replace(packing, count=len(parts[VALUES]))
    if packing.bytes >= W_OI.numel() * W_OI.element_size():
        return None
    parts = {suffix: parts[suffix] for suffix in packing.parts}
    return replace(packing, crc32=checksum(parts)), parts


def unpack(packing: Packing, parts: Parts) -> Tensor:
    """Return the matrix [out, in]: bit for bit as it was packed, or in float32 if its values are 8-bit."""
    values = bits(parts[VALUES])
    if packing.format == "bitmask":
        held = _unpack_bitmask(values, parts[MASK], packing.shape)
    else:
        assert packing.n is not None and packing.m is not None
        index = _unpack_index(parts[INDEX], packing.count, packing.m)
        held = _scatter_nm(values, index, packing.shape, packing.n, packing.m)
    return _scaled(held.view(parts[VALUES].dtype), parts.get(SCALE))


def check(name: str, packing: Packing, parts: Parts) -> None:
    """Refuse parts that are not what was packed.

    Raises:
        ModelError: a part is missing, has another dtype, length or checksum, or mask and indices are unsound.
    """

    def lie(why: str) -> ModelError:
        return ModelError(f"{name}: not a sound packed matrix ({why}); pack or download the model again")

    for suffix, (dtype, length) in packing.parts.items():
        part = parts.get(suffix)
        if part is None or part.dtype != dtype or tuple(part.shape) != (length,):
            raise lie(f"its part {name}{suffix} is not {length} values of {dtype}")
    if checksum({suffix: parts[suffix] for suffix in packing.parts}) != packing.crc32:
        raise lie("its checksum differs")
    if packing.format == "bitmask":
        if int(_popcount(parts[MASK]).sum()) != packing.count:
            raise lie("its mask does not count its values")
        if packing.shape[0] % ROWS or packing.shape[1] % COLUMNS:
            kept = _untiled(_expand(parts[MASK]), packing.shape)
            if kept[packing.shape[0] :].any() or kept[:, packing.shape[1] :].any():
                raise lie("its mask goes beyond its edges")
    if packing.m is not None and packing.n is not None:
        index = _unpack_index(parts[INDEX], packing.count, packing.m).view(-1, packing.n)
        if (index >= packing.m).any():
            raise lie("an index lies outside its group")
        if (index[:, 1:] <= index[:, :-1]).any():
            raise lie("indices of a group do not ascend")


def checksum(parts: Parts) -> int:
    """CRC-32 of the parts' bytes, one after the other."""
    crc = 0
    for part in parts.values():
        if part.numel():
            crc = zlib.crc32(part.detach().cpu().contiguous().view(torch.uint8).numpy().data, crc)
    return crc


def bits(W: Tensor) -> Tensor:
    """The bits of floats as integers."""
    return W.contiguous().view(INTEGER[W.element_size()])


def row_offsets(packing: Packing, parts: Parts) -> Tensor:
    """Where the values of each 4 rows begin, [row tiles + 1], for unpacking a few rows at a time."""
    down = _tiles(packing.shape[0], ROWS)
    if packing.n is not None and packing.m is not None:
        return torch.arange(down + 1, device="cpu") * (packing.count // down)
    per_row = _popcount(parts[MASK]).view(down, -1).sum(1).cpu()
    return torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])


def unpack_rows(packing: Packing, parts: Parts, offsets: Tensor, start: int, stop: int) -> Tensor:
    """Return rows `start` (a multiple of 4) to `stop` of a matrix, with values in the dtype that they have now."""
    a, b = (int(offsets[row]) for row in (start // ROWS, _tiles(stop, ROWS)))
    shape = (stop - start, packing.shape[1])
    scale_O = parts[SCALE][start:stop] if SCALE in parts else None
    if packing.n is not None and packing.m is not None:
        first, last = (place * _bits(packing.m) // 8 for place in (a, b))  # a step's indices are whole bytes
        index = _unpack_index(parts[INDEX][first:last], b - a, packing.m)
        held = _scatter_nm(parts[VALUES][a:b], index, shape, packing.n, packing.m)
    else:
        across = _tiles(packing.shape[1], COLUMNS) * ROWS * COLUMNS // 8
        mask = parts[MASK][start // ROWS * across : _tiles(stop, ROWS) * across]
        held = _unpack_bitmask(parts[VALUES][a:b], mask, shape)
    return _scaled(held, scale_O)


def _scaled(held_OI: Tensor, scale_O: Tensor | None) -> Tensor:
    return held_OI if scale_O is None else held_OI.float() * scale_O[:, None]


def _tiles(length: int, size: int) -> int:
    return -(-length // size)


def _popcount(mask: Tensor) -> Tensor:
    counts = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8, device=mask.device)
    return counts.index_select(0, mask.int())


def _pack_bitmask(held_OI: Tensor, kept_OI: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = held_OI.shape
    down, across = _tiles(rows, ROWS), _tiles(columns, COLUMNS)
    pad = (0, across * COLUMNS - columns, 0, down * ROWS - rows)

    def tiled(x_OI: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x_OI, pad)
        return padded.reshape(down, ROWS, across, COLUMNS).permute(0, 2, 1, 3).reshape(-1)

    kept = tiled(kept_OI)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=held_OI.device)
    return tiled(held_OI)[kept], (kept.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _unpack_bitmask(values: Tensor, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    kept = _expand(mask)
    flat = torch.zeros(len(kept), dtype=values.dtype, device=values.device).masked_scatter_(kept, values)
    return _untiled(flat, shape)[: shape[0], : shape[1]].contiguous()


def _expand(mask: Tensor) -> Tensor:
    """The bits of a mask as booleans, tile by tile."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, None] >> shifts) & 1).bool().view(-1)


def _untiled(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """What lies tile by tile as a matrix, padding included."""
    down, across = _tiles(shape[0], ROWS), _tiles(shape[1], COLUMNS)
    return flat.view(down, across, ROWS, COLUMNS).permute(0, 2, 1, 3).reshape(down * ROWS, across * COLUMNS)


def _pattern(name: str, kept_OI: Tensor, packing: Packing) -> tuple[int, int]:
    """The N:M pattern that packs smallest, if its places are nearly all used."""
    rows, columns = kept_OI.shape
    found: list[tuple[int, int, int]] = []
    for m in range(2, MAX_M + 1):
        groups = torch.nn.functional.pad(kept_OI, (0, -columns % m)).reshape(-1, m).sum(1)
        n = int(groups.max())
        places = rows * (columns // m * n + min(n, columns % m))
        if 0 < n < m and int(groups.sum()) >= TIGHT * places:
            found.append((replace(packing, count=_places(packing.shape, n, m), n=n, m=m).bytes, n, m))
    if not found:
        raise OptionError(f"{name}: its zeros have no N:M pattern with M up to {MAX_M}; use --format bitmask")
    return min(found)[1:]


def _bits(m: int) -> int:
    """Bits of an index."""
    return 1 if m <= 2 else 2 if m <= 4 else 4


def _steps(columns: int, m: int) -> tuple[int, int]:
    """How many steps cover a row, and the groups of each."""
    groups = MAX_M // m
    return _tiles(columns, groups * m), groups


def _places(shape: tuple[int, int], n: int, m: int) -> int:
    """Values that `nm` holds, those of padding included."""
    steps, groups = _steps(shape[1], m)
    return _tiles(shape[0], ROWS) * ROWS * steps * groups * n


def _pack_nm(held_OI: Tensor, kept_OI: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, columns = held_OI.shape
    steps, groups = _steps(columns, m)
    pad = (0, steps * groups * m - columns, 0, -rows % ROWS)

    def grouped(x_OI: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x_OI, pad)
        return padded.reshape(-1, ROWS, steps, groups * m).transpose(1, 2).reshape(-1, m)

    # A group with fewer than n values holds zeros too, those in front.
    index = torch.sort(grouped(kept_OI), dim=1, descending=True, stable=True).indices[:, :n].sort(dim=1).values
    per_byte = 8 // _bits(m)
    flat = index.to(torch.uint8).view(-1, per_byte)
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=flat.device) * _bits(m)
    return grouped(held_OI).gather(1, index).view(-1), (flat << shifts).sum(1, dtype=torch.uint8)


def _unpack_index(index: Tensor, count: int, m: int) -> Tensor:
    shifts = torch.arange(8 // _bits(m), dtype=torch.uint8, device=index.device) * _bits(m)
    found: Tensor = ((index[:, None] >> shifts) & (2 ** _bits(m) - 1)).view(-1)[:count]
    return found


def _scatter_nm(values: Tensor, index: Tensor, shape: tuple[int, int], n: int, m: int) -> Tensor:
    rows, columns = shape
    steps, groups = _steps(columns, m)
    places = index.long().view(-1, n)
    whole = torch.zeros(len(places), m, dtype=values.dtype, device=values.device)
    whole.scatter_(1, places, values.view(-1, n))
    tiles = whole.view(-1, steps, ROWS, groups * m).transpose(1, 2)
    return tiles.reshape(-1, steps * groups * m)[:rows, :columns].contiguous()

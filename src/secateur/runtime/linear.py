"""A linear layer whose weights stay packed in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.formats import ROWS, SCALE, Packing, checksum, row_offsets, unpack_rows

TILE_BYTES = 1 << 20  # of unpacked float32 weights at a time


class PackedLinear(nn.Module):
    """Computes x Wᵀ + b from packed weights, unpacking a few rows of W at a time.

    Its buffers are the parts on disk, under the same names: ``weight``, ``weight_mask`` or ``weight_index``, and
    ``weight_scale`` for 8-bit values. It stands for `nn.Linear` and for GPT-2's Conv1D.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, packing: Packing, bias: Tensor | None) -> None:
        """Make room for the parts of one matrix.

        Args:
            packing: what they are.
            bias: [out], or None.
        """
        super().__init__()
        self.packing = packing
        self.out_features, self.in_features = packing.shape
        device = None if bias is None else bias.device
        for suffix, (dtype, length) in packing.parts.items():
            self.register_buffer(f"weight{suffix}", torch.empty(length, dtype=dtype, device=device))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._offsets: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed parts, by suffix."""
        return {suffix: getattr(self, f"weight{suffix}") for suffix in self.packing.parts}

    def packing_now(self) -> Packing:
        """What the parts are now, after a cast."""
        parts = self.parts
        dtype = self.packing.dtype
        if self.packing.values != "int8":
            dtype = str(parts[""].dtype).removeprefix("torch.")
        values = "int8" if self.packing.values == "int8" else dtype
        return replace(self.packing, dtype=dtype, values=values, crc32=checksum(parts))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows of W, float32, [rows, in]; `start` is a multiple of 4."""
        if self._offsets is None:
            self._offsets = row_offsets(self.packing, self.parts)
        return unpack_rows(self.packing, self.parts, self._offsets, start, stop).float()

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, [..., out], computed in float32 and cast to x's dtype."""
        flat = x.reshape(-1, self.in_features).float()
        out = flat.new_empty(len(flat), self.out_features)
        step = max(ROWS, TILE_BYTES // (4 * self.in_features) // ROWS * ROWS)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            out[:, start:stop] = flat @ self.rows(start, stop).T
        if self.bias is not None:
            out += self.bias.float()
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        scale = self._buffers.get(f"weight{SCALE}")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self._buffers[f"weight{SCALE}"].dtype != torch.float32:  # type: ignore[union-attr]
            self._buffers[f"weight{SCALE}"] = scale.to(self.weight.device)  # a cast must not coarsen the scales
        self._offsets = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._offsets = None

    def extra_repr(self) -> str:
        """Shape and format, for printing."""
        values = ", int8" if self.packing.values == "int8" else ""
        return f"{self.in_features}, {self.out_features}, {self.packing.format}{values}, bias={self.bias is not None}"

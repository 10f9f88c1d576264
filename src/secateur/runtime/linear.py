"""Linear layers over the kernels: one whose weights stay packed in memory, and a dense one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..models.formats import ROWS, SCALE, VALUES, Packing, checksum, row_offsets, unpack_rows
from . import kernels
from .kernels import KernelMatrix

TILE_BYTES = 1 << 20  # of unpacked weights at a time
GPU_TILE_BYTES = 64 << 20  # a GPU is slow at many small steps
MOST_ROWS = 8  # of inputs for which weights are read as they are packed; beyond, unpacking costs less than it saves


def few_rows(x: Tensor, columns: int) -> bool:
    """Whether kernels may compute this product, and faster than a matrix product would."""
    return x.is_cpu and x.dtype in kernels.FLOATS and x.numel() <= MOST_ROWS * columns and x.shape[-1] == columns


def watched() -> bool:
    """Whether torch records or fakes operations here, which must see each of ours, and has tensors without memory."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0


def transformed() -> bool:
    """Whether torch.func or forward derivatives are at work, which kernels would not pass on."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class PackedLinear(nn.Module):
    """Computes x Wᵀ + b from packed weights.

    A few rows of inputs go through a kernel that reads W as it is packed; more of them, inputs with gradients, and
    other devices than the CPU, through W unpacked a few rows at a time. Sums are kept in float32 either way.

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
        self.activations: str | None = None
        device = None if bias is None else bias.device
        for suffix, (dtype, length) in packing.parts.items():
            self.register_buffer(f"weight{suffix}", torch.empty(length, dtype=dtype, device=device))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._kernel: KernelMatrix | None = None
        self._offsets: Tensor | None = None
        self._offsets_of: list[tuple[Any, ...]] = []
        self._number = _known(self)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed parts, by suffix."""
        return {name.removeprefix("weight"): part for name, part in self._buffers.items() if part is not None}

    def packing_now(self) -> Packing:
        """What the parts are now, after a cast."""
        parts = self.parts
        dtype = self.packing.dtype
        if self.packing.values != "int8":
            dtype = str(parts[""].dtype).removeprefix("torch.")
        values = "int8" if self.packing.values == "int8" else dtype
        return replace(self.packing, dtype=dtype, values=values, crc32=checksum(parts))

    def kernel(self) -> KernelMatrix | None:
        """The matrix as the kernels see it; None where there are none, or not for where it is."""
        kernel = self._kernel  # another thread may be at the same
        if kernel is None or not kernel.holds(self._buffers.values()):  # type: ignore[arg-type]
            parts = self.parts
            usable = all(part.is_cpu for part in parts.values()) and parts[VALUES].dtype in kernels.TYPES
            kernel = None
            if usable and kernels.library() is not None:
                kernel = KernelMatrix(self.packing.format, self.packing.shape, parts, self.packing)
            self._kernel = kernel
        return kernel

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32, *, unscaled: bool = False) -> Tensor:
        """Return rows of W, [rows, in]; `start` is a multiple of 4, and so is `stop` unless it is the last.

        `unscaled` leaves out the scales of 8-bit values, and is for where there are kernels.
        """
        if (kernel := self.kernel()) is not None and dtype in kernels.FLOATS:
            return kernel.unpack(start, stop, dtype, unscaled=unscaled)
        parts = self.parts
        now = kernels.seen(parts.values())
        if self._offsets is None or self._offsets_of != now:
            self._offsets, self._offsets_of = row_offsets(self.packing, parts), now
        return unpack_rows(self.packing, parts, self._offsets, start, stop).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b, [..., out], in x's dtype."""
        if torch.compiler.is_compiling() or watched():
            found: Tensor = _packed_linear(x, self._number, self.out_features)
            return found
        if few_rows(x, self.in_features) and not self._wants_gradients(x) and (kernel := self.kernel()) is not None:
            return kernel.linear(x, self.bias, self.activations == "int8")
        return self._by_tiles(x)

    def _wants_gradients(self, x: Tensor) -> bool:
        bias = self._parameters["bias"]
        if transformed():
            return True
        return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))

    def _by_tiles(self, x: Tensor) -> Tensor:
        native = x.is_cpu and x.dtype == torch.bfloat16 and kernels.native_bfloat16()
        dtype = torch.bfloat16 if native and self.weight.dtype in (torch.bfloat16, torch.int8) else torch.float32
        # 8-bit values are exact in bfloat16, and times their scales they are not.
        scale_O = self._buffers.get(f"weight{SCALE}") if dtype == torch.bfloat16 else None
        flat = x.reshape(-1, self.in_features).to(dtype)
        out = flat.new_empty(len(flat), self.out_features)
        tile_bytes = TILE_BYTES if x.is_cpu else GPU_TILE_BYTES
        step = max(ROWS, tile_bytes // (dtype.itemsize * self.in_features) // ROWS * ROWS)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            tile = self.rows(start, stop, dtype, unscaled=scale_O is not None)
            bias = None if self.bias is None or scale_O is not None else self.bias[start:stop].to(dtype)
            out[:, start:stop] = nn.functional.linear(flat, tile, bias)
        if scale_O is not None:
            out = out.float() * scale_O if self.bias is None else out.float() * scale_O + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLinear:
        scale = self._buffers.get(f"weight{SCALE}")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if scale is not None and self._buffers[f"weight{SCALE}"].dtype != torch.float32:  # type: ignore[union-attr]
            self._buffers[f"weight{SCALE}"] = scale.to(self.weight.device)  # a cast must not coarsen the scales
        self._forget()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        self._number = _known(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kernel"}

    def _forget(self) -> None:
        """Drop what was derived from the parts."""
        self._kernel = self._offsets = None

    def extra_repr(self) -> str:
        """Shape and format, for printing; peft shows it where it refuses a layer."""
        values = ", int8" if self.packing.values == "int8" else ""
        shape = f"{self.in_features}, {self.out_features}, {self.packing.format}{values}, bias={self.bias is not None}"
        return f"{shape}, dense by: secateur unpack"


# A compiled graph calls a layer by its number, since it cannot hold what is no tensor.
_numbers = itertools.count()
_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


def _known(layer: PackedLinear) -> int:
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op("secateur::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, layer: int, out_features: int) -> Tensor:
    return _layers[layer](x)  # type: ignore[no-any-return]


@_packed_linear.register_fake
def _(x: Tensor, layer: int, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


class KernelLinear(nn.Linear):
    """A dense linear layer that computes a few rows with our kernel, where that beats torch's.

    Layers become one by a change of class, so that their weights, ties and hooks stay what they are.
    """

    _kernel: KernelMatrix | None = None

    def kernel(self) -> KernelMatrix:
        """The matrix as the kernels see it."""
        if self._kernel is None or not self._kernel.holds((self.weight,)):
            rows, columns = self.weight.shape
            self._kernel = KernelMatrix("dense", (rows, columns), {VALUES: self.weight}, None)
        return self._kernel

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + b."""
        weight = self.weight
        if (
            not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not (watched() or transformed() or torch.is_autocast_enabled("cpu"))
            and type(weight) in (Tensor, nn.Parameter)  # another may have no memory of its own
            and few_rows(input, weight.shape[1])
            and input.dtype == weight.dtype
            and weight.is_cpu
            and weight.is_contiguous()
            and self.in_features
            and kernels.library() is not None  # a pickled layer may come from another machine
        ):
            return self.kernel().linear(input, self.bias)
        return super().forward(input)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> KernelLinear:
        self._kernel = None  # or the former weights would stay in memory
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kernel"}


class UnpackedLinear(nn.Linear):
    """A matrix of a packed checkpoint that runs dense here; it is packed again when it is saved."""

    packing: Packing

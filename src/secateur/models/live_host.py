"""A model in memory as a host: it is pruned in place and otherwise leaves as it came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .anatomy import Skeleton
from .hosts import own_tensors
from .matrices import Matrix

ALIGNED_BYTES = 64  # what torch aligns its own memory to


class LiveHost:
    """A model in memory, pruned in place. It leaves as it came: same parameters, dtypes, devices and modes."""

    def __init__(self, model: PreTrainedModel, computing: torch.dtype | None = None) -> None:
        """Take a model that lies whole in memory, on one device or spread over several.

        Args:
            model: in memory.
            computing: the dtype blocks compute in; None is float32 on a CPU, and on a GPU what the model came in.

        Raises:
            ModelError: parts of it were left on disk.
        """
        elsewhere = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
        if elsewhere is not None:
            raise ModelError(
                f"{elsewhere}: is not in place (device_map left it in CPU memory or on disk); give the model's "
                "directory instead, which is pruned block by block"
            )
        self.model = model
        self.skeleton = Skeleton(model)
        self.skeleton.refuse_shared_weights()
        self.device = next(model.parameters()).device
        # On a GPU the model computes as it came: some of its tensors, such as rotary frequencies, must stay float32.
        self._dtype = computing or (torch.float32 if self.device.type == "cpu" else None)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Put the model into evaluation mode, without gradients, and its skeleton into the dtype of computing.

        No parameter wants a gradient meanwhile, as none of a model on disk does. By one that wants it torch multiplies
        otherwise, even under `no_grad` (`matmul` folds batches then), and the last bits differ.
        """
        gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self.model.parameters()]
        for parameter, _, _ in gradients:
            parameter.grad = None
            parameter.requires_grad_(False)
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with resident(self.skeleton.outside, self._dtype), torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            for parameter, wanted, gradient in gradients:
                parameter.requires_grad_(wanted)
                parameter.grad = gradient

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield block `index`, on a CPU in float32."""
        block = self.skeleton.real[index]
        try:
            with resident(block.modules(), self._dtype):
                yield block
        finally:
            for parameter in block.parameters():
                parameter.__dict__.pop("changed", None)

    def written_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype in which a matrix is kept."""
        dtype: torch.dtype = getattr(matrix.weight, "own_dtype", matrix.weight.dtype)
        return dtype


@contextmanager
def resident(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Hold floating parameters and buffers of modules in `dtype` for a while; None leaves each in its own.

    On a CPU, what does not lie as torch would lay it (`_lies_well`) is held in a copy that does. Afterwards each
    tensor is its former self again; a parameter marked `changed` gets its new value first.
    """
    former: list[tuple[Tensor, Tensor]] = []
    for tensor in own_tensors(modules):
        if dtype is not None and tensor.is_floating_point() and not (tensor.dtype == dtype and _lies_well(tensor)):
            former.append((tensor, tensor.data))
            tensor.own_dtype = tensor.dtype  # type: ignore[attr-defined]
            tensor.data = tensor.data.to(dtype, copy=True, memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        for tensor, data in reversed(former):
            if tensor.__dict__.pop("changed", False):
                data.copy_(tensor.data)
            tensor.data = data
            del tensor.own_dtype  # type: ignore[attr-defined]


def _lies_well(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous and begins at a multiple of 64 bytes, as one that was read from a disk does.

    The last bits of a product depend on it.
    """
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNED_BYTES == 0

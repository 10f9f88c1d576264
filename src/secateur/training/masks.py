"""Masks that hold: which weights of a model in memory stay zero, whatever an optimiser does to them.

Two things keep a masked weight at zero. Its gradient is cleared as soon as it is there, so that it counts in no
norm that gradients are clipped by, and in no momentum. And the weight itself is cleared after every step, since
an optimiser may hold momentum of a time before the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from ..errors import ModelError, OptionError, nearest
from ..models.anatomy import find_blocks
from ..models.checkpoint import QUANT_METHOD
from ..models.matrices import Matrix, matrices

FEWEST_ZEROS = 0.01  # of a model's matrices: below, they are zeros by chance, as in any checkpoint of 8 or 16 bits
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Masks:
    """The masks of a model's matrices, by the name of the parameter that holds them.

    Of a parameter one byte a weight is kept, -1 for a weight that stays and 0 for one that is held at zero: so that
    clearing is one pass of bitwise and, which is exact for whatever number stood there.
    """

    def __init__(self, model: PreTrainedModel, keep: Mapping[str, Tensor]) -> None:
        """Mask parameters of a model, and clear what is masked.

        Args:
            model: in memory, not packed.
            keep: for names of parameters (``model.layers.0.mlp.up_proj.weight``) a boolean tensor of the parameter's
                own shape, True = keep.

        Raises:
            OptionError: a mask does not fit.
            ModelError: the model cannot be trained.
        """
        parameters = dict(model.named_parameters())
        check_trainable(model)
        self.parameters: dict[str, nn.Parameter] = {}
        self._bits: dict[str, Tensor] = {}
        for name, mask in keep.items():
            if name not in parameters:
                raise OptionError(f"mask {name!r}: is no parameter of the model; {nearest(name, parameters)}")
            parameter = parameters[name]
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise OptionError(
                    f"mask {name!r}: must be boolean {list(parameter.shape)}, and is "
                    f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                )
            self.parameters[name] = parameter
            self._bits[name] = mask.to(parameter.device).to(torch.int8).neg_()
        self.apply()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Masks:
        """Return masks that keep every zero which a pruned model's matrices have now.

        Raises:
            ModelError: it has no zeros to speak of, or cannot be trained.
        """
        masks = cls.of_matrices(model)
        if masks.sparsity < FEWEST_ZEROS:
            raise ModelError(
                f"{model.name_or_path or type(model).__name__}: {masks.sparsity:.2%} of its matrices' weights are "
                "zero, so there are no zeros to keep; prune it first, or prune it on the way (sparsity)"
            )
        return masks

    @classmethod
    def of_matrices(cls, model: PreTrainedModel) -> Masks:
        """Return masks of all matrices, which keep the zeros that there are; few or none are fine."""
        check_trainable(model)
        weights = {matrix.parameter: matrix.weight for matrix in model_matrices(model).values()}
        return cls(model, {name: weight.detach() != 0 for name, weight in weights.items()})

    @property
    def sparsity(self) -> float:
        """Fraction of the masked parameters' weights that is held at zero."""
        weights = sum(bits.numel() for bits in self._bits.values())
        return self.zeros / weights if weights else 0.0

    @property
    def zeros(self) -> int:
        """How many weights are held at zero."""
        return sum(bits.numel() - int(bits.count_nonzero()) for bits in self._bits.values())

    def keep(self, matrix: Matrix) -> Tensor:
        """Return a matrix's mask [out, in], True = keep."""
        return matrix.part(self._bits[matrix.parameter]) != 0

    def set(self, matrix: Matrix, keep_OI: Tensor) -> None:
        """Give a matrix another mask, and clear what it masks."""
        matrix.part(self._bits[matrix.parameter]).copy_(keep_OI.to(torch.int8).neg_())
        _clear(matrix.weight, self._bits[matrix.parameter])

    def take(self) -> None:
        """Take the zeros that the masked parameters have now for their masks."""
        for name, parameter in self.parameters.items():
            self._bits[name] = (parameter.detach() != 0).to(torch.int8).neg_()

    def apply(self) -> None:
        """Clear every masked weight."""
        for name, parameter in self.parameters.items():
            self._follow(name, parameter)
            _clear(parameter, self._bits[name])

    def _follow(self, name: str, parameter: nn.Parameter) -> None:
        if self._bits[name].device != parameter.device:  # a trainer moved the model
            self._bits[name] = self._bits[name].to(parameter.device)
        if self._bits[name].shape != parameter.shape:
            raise ModelError(
                f"{name}: its shape became {list(parameter.shape)} in training; masks cannot follow parameters that "
                "are split over devices (FSDP, ZeRO 3)"
            )

    @contextmanager
    def held(self) -> Iterator[Masks]:
        """Clear gradients of masked weights as they come, and the weights after every step of whatever optimiser.

        An optimiser that is no `torch.optim.Optimizer` is not noticed: call `apply` after its steps.

        >>> import torch, transformers, secateur
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> model = secateur.prune(transformers.LlamaForCausalLM(config), method="magnitude").model
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> with secateur.Masks.of(model).held() as masks:
        ...     model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        ...     optimizer.step()
        >>> masks.sparsity, float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
        (0.5, 0.5)
        """
        handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._cleared(name))
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        ]
        handles.append(register_optimizer_step_post_hook(lambda *_: self.apply()))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _cleared(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and parameter.grad.shape == self._bits[name].shape:
                _clear(parameter.grad, self._bits[name].to(parameter.grad.device))

        return hook


def _clear(values: Tensor, bits: Tensor) -> None:
    """Set to +0.0, in place, where the bits are 0; NaN and Inf too."""
    values.detach().view(BITS[values.element_size()]).bitwise_and_(bits)


def model_matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return the matrices of all blocks of a model in memory, by name; those of adapters are none of the model's."""
    path, blocks = find_blocks(model)
    found = {n: m for index, block in enumerate(blocks) for n, m in matrices(block, f"{path}.{index}").items()}
    own = {id(module) for module in blocks.modules()} - set(map(id, _adapters(blocks)))
    return {name: matrix for name, matrix in found.items() if id(matrix.module) in own}


def _adapters(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """The layers that peft has put beside those of a model."""
    for layer in blocks.modules():
        if hasattr(layer, "base_layer"):
            yield from (m for name, m in layer.named_modules() if name and name.split(".")[0] != "base_layer")


def check_trainable(model: PreTrainedModel) -> None:
    """Refuse a model whose matrices no optimiser can take steps on.

    Raises:
        ModelError: it is packed, on no device, or in a dtype in which small steps vanish.
    """
    name = model.name_or_path or type(model).__name__
    if getattr(model, "quantization_method", None) == QUANT_METHOD:
        raise ModelError(
            f"{name}: is packed, and packed weights cannot be trained; secateur finetune takes its directory"
        )
    for matrix in model_matrices(model).values():
        weight = matrix.weight
        if weight.device.type == "meta":
            raise ModelError(
                f"{matrix.parameter}: is not in memory (device_map left it elsewhere); load the whole model"
            )
        if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            kind = str(weight.dtype).removeprefix("torch.")
            raise ModelError(
                f"{matrix.parameter}: is {kind}, in which training fails (its steps vanish or overflow); load the "
                "model with dtype=torch.float32"
            )

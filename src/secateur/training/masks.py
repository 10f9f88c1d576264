"""Masks that hold: which weights of a model in memory stay zero, whatever an optimiser does to them.

Two things keep a masked weight at zero. Its gradient is cleared as soon as it is there, so that it counts in no
norm that gradients are clipped by, and in no momentum. And the weight itself is cleared after every step, since
an optimiser may hold momentum of a time before the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from ..errors import ModelError, OptionError, nearest
from ..models.anatomy import find_blocks
from ..models.checkpoint import QUANT_METHOD
from ..models.in_memory import eager, model_in_memory, names_of, refuse_quantised
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
            model: in memory, not packed; it may be wrapped, and have adapters.
            keep: for names of parameters (``model.layers.0.mlp.up_proj.weight``) a boolean tensor of the parameter's
                own shape, True = keep. The name that a weight has without adapters, or compiling, will do.

        Raises:
            OptionError: a mask does not fit.
            ModelError: the model cannot be trained.
        """
        check_trainable(model)
        known = names_of(model)
        self.parameters: dict[str, nn.Parameter] = {}
        self._bits: dict[str, Tensor] = {}
        for name, mask in keep.items():
            if name not in known:
                raise OptionError(f"mask {name!r}: is no parameter of the model; {nearest(name, known)}")
            for own, parameter in known[name].items():
                if mask.dtype != torch.bool or mask.shape != parameter.shape:
                    raise OptionError(
                        f"mask {name!r}: must be boolean {list(parameter.shape)}, and is "
                        f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
                    )
                self.parameters[own] = parameter
                self._bits[own] = mask.to(parameter.device).to(torch.int8).neg_()
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
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
                f"{_called(model_in_memory(model))}: {masks.sparsity:.2%} of its matrices' weights are "
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
        self._apply(self.parameters)

    def _apply(self, names: Iterable[str]) -> None:
        for name in names:
            self._follow(name, self.parameters[name])
            _clear(self.parameters[name], self._bits[name])

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
        """Clear gradients of masked weights as they come, and the weights after every step of an optimiser of theirs.

        An optimiser's step clears what that optimiser holds: other weights may be in use, if it takes its step in the
        midst of backward. One that is no `torch.optim.Optimizer` is not noticed: call `apply` after its steps.

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
        handles.append(register_optimizer_step_pre_hook(self._before_step))
        handles.append(register_optimizer_step_post_hook(lambda optimizer, *_: self._apply(self._of(optimizer))))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _of(self, optimizer: Optimizer) -> list[str]:
        """The names of the masked parameters that an optimiser holds."""
        held = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        return [self._names[key] for key in held if key in self._names]

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Clear the gradients of a step in the midst of backward: its hook may have come before ours."""
        if torch._C._current_graph_task_id() != -1:
            for name in self._of(optimizer):
                self._clear_gradient(name, self.parameters[name])

    def _cleared(self, name: str) -> Callable[[Tensor], None]:
        return lambda parameter: self._clear_gradient(name, parameter)

    def _clear_gradient(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.shape == self._bits[name].shape:
            _clear(parameter.grad, self._bits[name].to(parameter.grad.device))


def _clear(values: Tensor, bits: Tensor) -> None:
    """Set to +0.0, in place, where the bits are 0; NaN and Inf too."""
    values.detach().view(BITS[values.element_size()]).bitwise_and_(bits)


def model_matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return the matrices of all blocks of a model in memory, by name; those of adapters are none of the model's."""
    model = model_in_memory(model)
    with eager(model):
        path, blocks = find_blocks(model)
        found = {n: m for index, block in enumerate(blocks) for n, m in matrices(block, f"{path}.{index}").items()}
        beside = set(map(id, beside_layers(blocks)))
    return {name: matrix for name, matrix in found.items() if id(matrix.module) not in beside}


def beside_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that peft has put beside a model's layers: not the layers, nor copies of them that are trained."""
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            yield from (m for name, m in layer.named_modules() if name and name.split(".")[0] != "base_layer")


def check_trainable(model: PreTrainedModel) -> None:
    """Refuse a model whose matrices no optimiser can take steps on.

    Raises:
        ModelError: it is packed or quantised, on no device, or in a dtype in which small steps vanish.
    """
    model = model_in_memory(model)
    if getattr(model, "quantization_method", None) == QUANT_METHOD:
        raise ModelError(
            f"{_called(model)}: is packed, and packed weights cannot be trained; secateur finetune takes its directory"
        )
    refuse_quantised(model)
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


def _called(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__

"""LoRA under a mask: W + M * (B A), whose zeros stay zeros in training and after the merge.

Zimmer et al. 2023, PERP, https://arxiv.org/abs/2312.15230 ("MaskLoRA"). A plain LoRA fills the zeros when it is merged.
The layers are peft's; the mask is W != 0 itself, so that nothing else has to be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, OptionError
from ..models.anatomy import find_blocks
from ..models.in_memory import eager, model_in_memory, refuse_adapters
from .masks import check_trainable, model_matrices
from .merging import merge_lora

__all__ = ["masked_lora", "merge_lora"]

INSTALL_PEFT = "pip install peft"


def masked_lora(model: PreTrainedModel, *, rank: int = 16, alpha: int | None = None) -> PreTrainedModel:
    """Put masked low-rank adapters beside the linear layers of a model's blocks, and freeze everything else.

    Fused experts get none.

    Args:
        model: in memory; it may be wrapped (torch.compile, DDP).
        rank: of the adapters.
        alpha: the adapters' product is scaled by alpha / rank; None is twice the rank.

    Returns:
        The same model, with layers of peft in the place of its linear layers until `merge_lora`.

    Raises:
        OptionError: peft is missing, or the rank cannot be.
        ModelError: no matrix can carry an adapter, or the model has adapters already.
    """
    if rank < 1:
        raise OptionError(f"rank {rank}: at least 1 is needed")
    peft = need_peft()
    refuse_adapters(model)
    model = model_in_memory(model)
    check_trainable(model)
    with eager(model):
        _put_beside(model, rank, alpha, peft)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in 16 bits W + B A would often be just 0
    return model


def _put_beside(model: PreTrainedModel, rank: int, alpha: int | None, peft: Any) -> None:
    path, blocks = find_blocks(model)
    chosen = {name: m for name, m in model_matrices(model).items() if m.expert is None and _is_linear(m.module)}
    if not chosen:
        raise ModelError(
            f"{type(model).__name__}: has no linear layers for LoRA, only fused experts; train full or bias"
        )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=[name.removeprefix(f"{path}.") for name in chosen],
        fan_in_fan_out=any(matrix.transposed for matrix in chosen.values()),
    )
    masked = _masked_layer()
    config._register_custom_module({nn.Linear: masked, Conv1D: masked})
    model.requires_grad_(requires_grad=False)
    # Of the blocks alone: of a whole mixture peft would take names of dense layers for names of experts.
    peft.inject_adapter_in_model(config, blocks)


def _is_linear(module: Any) -> bool:
    """Whether a layer, perhaps of a class of the model's own, gives x Wᵀ + b."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    x = torch.ones(1, module.weight.shape[1], dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError, ValueError):  # it takes inputs of another shape
        return False


def need_peft() -> Any:
    """Return the library peft; OptionError if it is not installed."""
    try:
        import peft
    except ImportError:
        raise OptionError(f"LoRA needs peft: {INSTALL_PEFT}; or train full or bias") from None
    return peft


def _masked_layer() -> Any:
    from peft.tuners.lora import Linear

    class MaskedLinear(Linear):
        """A layer of peft that computes with W + M * (B A), M = (W != 0)."""

        def get_delta_weight(self, adapter: str) -> Tensor:
            base: Any = self.get_base_layer()
            return torch.where(base.weight != 0, super().get_delta_weight(adapter), 0)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
            if self.disable_adapters or self.merged or not active:
                return super().forward(x, *args, **kwargs)
            base: Any = self.get_base_layer()
            W: Tensor = base.weight
            for adapter in active:
                W = (W + self.get_delta_weight(adapter)).to(W.dtype)  # rounded as by the merge
            return nn.functional.linear(x, W.T if self.fan_in_fan_out else W, base.bias)

    return MaskedLinear

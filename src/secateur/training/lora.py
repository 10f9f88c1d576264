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
from .masks import Masks, check_trainable, model_matrices

INSTALL_PEFT = "pip install peft"


def masked_lora(model: PreTrainedModel, *, rank: int = 16, alpha: int | None = None) -> Any:
    """Put masked low-rank adapters beside all matrices of a model but fused experts; everything else is frozen.

    Args:
        model: in memory.
        rank: of the adapters.
        alpha: the adapters' product is scaled by alpha / rank; None is twice the rank.

    Returns:
        A ``peft.PeftModel``; its ``merge_and_unload()`` gives a model with the same zeros, and the same function.

    Raises:
        OptionError: peft is missing, or the rank cannot be.
        ModelError: no matrix can carry an adapter.
    """
    if rank < 1:
        raise OptionError(f"rank {rank}: at least 1 is needed")
    peft = _peft()
    check_trainable(model)
    names = [name for name, matrix in model_matrices(model).items() if matrix.expert is None]
    if not names:
        raise ModelError(
            f"{type(model).__name__}: has no linear layers for LoRA, only fused experts; train full or bias"
        )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=names,
        bias="none",
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    masked = _masked_layer()
    config._register_custom_module({nn.Linear: masked, Conv1D: masked})
    return peft.get_peft_model(model, config)


def merge_lora(model: Any) -> PreTrainedModel:
    """Merge the adapters of a ``peft.PeftModel`` into its model, and keep every zero of that.

    With adapters of `masked_lora` the merged model computes the same; with others, what they gave through masked
    weights is lost.

    Raises:
        ModelError: it is no model with adapters that can be merged.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ModelError(f"{type(model).__name__}: is no model with adapters of peft")
    base = model.get_base_model()
    layers = {n: m for n, m in base.named_modules() if hasattr(m, "get_base_layer") and hasattr(m, "merge")}
    keep = {f"{name}.weight": layer.get_base_layer().weight.detach() != 0 for name, layer in layers.items()}
    merged: PreTrainedModel = model.merge_and_unload()
    Masks(merged, keep)  # which clears what it masks
    return merged


def _peft() -> Any:
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

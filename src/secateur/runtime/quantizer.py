"""Packed checkpoints in transformers: `from_pretrained` opens them, `save_pretrained` writes them again.

transformers calls whatever keeps weights in a form of its own a quantizer; ours rounds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ModelError
from ..models.checkpoint import QUANT_METHOD, VERSION, parse_packings
from ..models.formats import DTYPES, Packing, unpack
from ..models.memory import give_back_memory, large_tensors_apart
from ..models.shards import Info, PackedInfo, read_header, read_parts, with_packed
from .arrangement import optimize, repack
from .linear import KernelLinear, PackedLinear, UnpackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class SecateurConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint (docs/formats.md)."""

    def __init__(self, version: int = VERSION, matrices: dict[str, Any] | None = None, **others: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.version, self.matrices = version, matrices or {}


@register_quantizer(QUANT_METHOD)
class SecateurQuantizer(HfQuantizer):
    """Replaces linear layers by packed ones, and checks every tensor before anything is computed."""

    quantization_config: SecateurConfig
    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **others: Any
    ) -> PreTrainedModel:
        # Here, since this module is loaded in the midst of transformers' own import.
        from ..models.disk_host import names_in_memory, refuse_turned

        large_tensors_apart()
        config = self.quantization_config.to_dict()
        packings = parse_packings(config, str(model.config.name_or_path))
        tensors: dict[str, Any] = {}
        for file in checkpoint_files or ():
            tensors |= read_header(Path(file))[0]
        found = with_packed(tensors, packings)
        targets = names_in_memory(model, found)
        _check_names(model, found, targets)
        refuse_turned(model, {n: info for n, info in found.items() if isinstance(info, PackedInfo)}, targets)
        for info in found.values():
            if isinstance(info, PackedInfo):
                read_parts(info)  # checks mask, indices and checksum
                path = targets[info.name].removesuffix(".weight")
                parent, _, leaf = path.rpartition(".")
                linear: Any = model.get_submodule(path)
                setattr(
                    model.get_submodule(parent), leaf, PackedLinear(info.packing, linear.bias).to(linear.weight.device)
                )
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **others: Any) -> PreTrainedModel:
        give_back_memory()  # what the checks took
        optimize(model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Note how the matrices are packed now, before they are saved under their names in memory."""
        state: dict[str, Tensor] = {}
        packings: dict[str, Packing] = {}
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                packings[f"{name}.weight"] = packing = module.packing_now()
                if packing.dtype not in DTYPES:
                    raise ModelError(f"{name}: cannot be saved packed in {packing.dtype}; cast the model first")
            elif isinstance(module, UnpackedLinear) and (found := repack(module)):
                packings[f"{name}.weight"] = found[0]
                state |= {f"{name}.weight{suffix}": part for suffix, part in found[1].items()}
            elif isinstance(module, UnpackedLinear) and module.packing.transposed:
                state[f"{name}.weight"] = module.weight.detach().T.contiguous()  # dense, as the model has it on disk
        self.quantization_config.matrices = {name: packing.to_json() for name, packing in packings.items()}
        return (model.state_dict() | state if state else None), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put dense layers in the place of packed ones, with exactly their weights; all can be trained."""
        now = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        made: dict[nn.Module, nn.Module] = {}  # a layer may stand in several places
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, (PackedLinear, UnpackedLinear)):
                made[module] = made.get(module) or _dense(module, dtype or now)
                model.set_submodule(name, made[module])
            elif type(module) is KernelLinear:
                module.__class__ = nn.Linear  # type: ignore[assignment]
                module.__dict__.pop("_kernel", None)
        for parameter in model.parameters():
            if dtype is not None and parameter.dtype == now:
                parameter.data = parameter.data.to(dtype)
        return model

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights cannot be trained."""
        return False


def _dense(module: PackedLinear | UnpackedLinear, dtype: torch.dtype) -> nn.Module:
    """The layer that a packed one was made of."""
    from transformers.pytorch_utils import Conv1D  # here, since this module is loaded in the midst of their import

    weight = unpack(module.packing_now(), module.parts) if isinstance(module, PackedLinear) else module.weight.detach()
    rows, columns = weight.shape
    with torch.device("meta"):
        of_gpt2 = module.packing.transposed
        dense = Conv1D(rows, columns) if of_gpt2 else nn.Linear(columns, rows, bias=module.bias is not None)
    dense.weight = nn.Parameter((weight.T if of_gpt2 else weight).to(dtype).contiguous())
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype))
    return dense.train(module.training)


def _check_names(model: PreTrainedModel, found: dict[str, Info], targets: dict[str, str]) -> None:
    """Refuse a checkpoint that lacks a tensor of the model or holds one of another shape.

    transformers leaves this check to quantizers, and would fill missing tensors with random numbers.
    """
    state = model.state_dict()
    held: dict[str, list[Info]] = {}
    for name, info in found.items():
        held.setdefault(targets[name], []).append(info)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = sorted(name for name in state.keys() - held.keys() - tied)
    if missing:
        raise ModelError(f"{model.config.name_or_path}: the checkpoint has no {missing[0]}; pack or download it again")
    for name in state.keys() & held.keys():
        infos = held[name]
        if len(infos) == 1 and tuple(infos[0].shape) != tuple(state[name].shape):
            raise ModelError(
                f"{name}: has the shape {list(infos[0].shape)} on disk and {list(state[name].shape)} in the model; "
                "pack or download it again"
            )
    for name, info in found.items():
        if isinstance(info, PackedInfo):
            module = model.get_submodule(targets[name].removesuffix(".weight")) if targets[name] in state else None
            if not isinstance(module, nn.Module) or getattr(module, "weight", None) is None:
                raise ModelError(f"{name}: is packed, and no linear layer of the model; pack or download it again")

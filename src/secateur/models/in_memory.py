"""What a user gives for a model in memory -> the model of transformers in it, or one line that says why not.

Wrappers and adapters are known by the names of their classes: no library is imported that the process has not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import ModelError
from .checkpoint import QUANT_METHOD
from .shards import WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # in whose import this module is loaded

INSIDE = {  # where a wrapper of that class keeps what it wraps
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "PeftModel": "base_model",
    "PeftMixedModel": "base_model",
    "BaseTuner": "model",
    "AdaptionPromptModel": "model",
}
SPLITS = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")  # their weights are not whole in one process
IN_PASSING = re.compile(r"\.(base_layer|original_module|token_adapter|_orig_mod|modules_to_save\.[^.]+)(?=\.)")


def is_path(given: Any) -> bool:
    """Whether a model is given by its name, and not itself."""
    return isinstance(given, (str, os.PathLike))


def model_name(given: Any) -> str:
    """Return the name of a model, where only a name will do.

    Raises:
        ModelError: it is something else, such as a model in memory.
    """
    if is_path(given):
        return str(given)
    kind = type(given).__name__
    if isinstance(given, nn.Module):
        raise ModelError(f"{kind}: is a model in memory; save_pretrained it, and give the directory")
    raise ModelError(f"{kind}: names no model; give a directory, a hub id, a .gguf file, or smollm2")


def model_in_memory(given: Any) -> PreTrainedModel:
    """Return the model of transformers in what a user gives: itself, or what torch, accelerate or peft has wrapped.

    Raises:
        ModelError: there is none, or its weights are split over processes.
    """
    model = list(_wrapped(given))[-1]
    if not _is_model(model):
        raise ModelError(f"{type(model).__name__}: is no model of transformers{_near(model)}")
    for module in model.modules():
        _refuse_split(module)
    for name, parameter in model.named_parameters():
        if "DTensor" in _kinds(parameter) or hasattr(parameter, "ds_numel"):
            raise ModelError(
                f"{name}: is split over processes (FSDP, tensor parallel, ZeRO 3); gather the model, save_pretrained "
                "it, and load it whole"
            )
    found: PreTrainedModel = model
    return found


def names_of(given: Any) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of a model by every name that they go by: own name in the model -> parameter.

    The names are the model's own without what is compiled, those that its wrappers give, and those that it has without
    adapters; there one name may stand for several, the frozen weight and its trained copies.
    """
    model, found = model_in_memory(given), dict[str, dict[str, nn.Parameter]]()
    with eager(model):
        own = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in own.items()}
    for name, parameter in own.items():
        found.setdefault(plain_name(name), {})[name] = parameter
    for layer in _wrapped(given):
        for name, parameter in layer.named_parameters():
            if id(parameter) in names:
                found[name] = {names[id(parameter)]: parameter}
    return found | {name: {name: parameter} for name, parameter in own.items()}


def plain_name(name: str) -> str:
    """Return the name that a parameter, or a module's child, has in the model without adapters.

    >>> plain_name("model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return IN_PASSING.sub("", name)


def of_peft(module: nn.Module) -> bool:
    """Whether a module is one that peft, or a class made of one of peft's, has put into a model."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def adapters(model: PreTrainedModel) -> list[str]:
    """Return the names of the outermost modules of peft in a model; a model without may be marked as having some."""
    found: list[str] = []
    for name, module in model.named_modules():
        if of_peft(module) and not (found and f"{name}.".startswith(f"{found[-1]}.")):
            found.append(name)
    return found


def is_marked(model: PreTrainedModel) -> bool:
    """Whether transformers would save a model's adapters in place of the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def refuse_adapters(given: Any) -> None:
    """Raise ModelError for a model that has adapters, or a prompt that was trained."""
    refuse_prompts(given)
    model = model_in_memory(given)
    found = adapters(model)
    if found or is_marked(model):
        where = found[0] if found else type(model).__name__
        raise ModelError(f"{where}: carries adapters of peft; merge them first: model = secateur.merge_lora(model)")


def refuse_prompts(given: Any) -> None:
    """Raise ModelError for a model that is more than its layers: with a trained prompt, say."""
    for layer in _wrapped(given):
        configs = getattr(layer, "peft_config", {}) if _kinds(layer) & {"PeftModel", "PeftMixedModel"} else {}
        for config in configs.values():
            kind = getattr(config.peft_type, "value", config.peft_type)
            if config.is_prompt_learning or kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
                raise ModelError(
                    f"{type(layer).__name__}: what it has learnt ({kind}) lies outside the model's layers, and would "
                    "be lost; give the model without it: model.get_base_model()"
                )


def refuse_quantised(model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose weights are no plain floating numbers; packed ones of ours may pass."""
    method = getattr(model, "quantization_method", None)
    if method is None and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "unknown")
    if method is not None and method != QUANT_METHOD:
        raise ModelError(
            f"{model.name_or_path or type(model).__name__}: its weights are quantised "
            f"({getattr(method, 'value', method)}); take the original 16-bit model instead"
        )
    for name, parameter in model.named_parameters():
        plain = type(parameter) in (nn.Parameter, Tensor) and parameter.dtype in WEIGHTS
        if parameter.ndim > 1 and not plain:
            form = str(parameter.dtype).removeprefix("torch.")
            form = form if parameter.dtype not in WEIGHTS else type(parameter).__name__
            raise ModelError(f"{name}: is quantised ({form}); take the original 16-bit model instead")


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Take what is compiled, or wrapped for mixed precision by accelerate, out of a model for a while.

    Afterwards it is back, where it still fits: what stood under a compiled module may have been exchanged meanwhile.
    """
    undo: list[Callable[[], object]] = []
    try:
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                inner = _uncompiled(child)
                if child is not None and inner is not child and "OptimizedModule" not in _kinds(parent):
                    parent._modules[name] = inner
                    undo.append(partial(_put_back, parent, name, inner, child))
        for module in list(model.modules()):
            undo += _made_eager(module)
        yield
    finally:
        for act in reversed(undo):
            act()


def _made_eager(module: nn.Module) -> list[Callable[[], object]]:
    held = module.__dict__
    former = {key: held[key] for key in ("_compiled_call_impl", "forward") if held.get(key) is not None}
    if "_compiled_call_impl" in former:
        held["_compiled_call_impl"] = None
    if "forward" in former:
        forward = held.get("_original_forward", held["forward"])  # accelerate keeps it where it casts
        held["forward"] = getattr(forward, "_torchdynamo_orig_callable", forward)
    return [partial(held.update, former)] if former else []


def _uncompiled(module: Any) -> Any:
    while "OptimizedModule" in _kinds(module):
        module = module._orig_mod
    return module


def _put_back(parent: nn.Module, name: str, inner: nn.Module, compiled: nn.Module) -> None:
    if parent._modules.get(name) is inner:
        parent._modules[name] = compiled


def _kinds(given: Any) -> set[str]:
    return {kind.__name__ for kind in type(given).__mro__}


def _wrapped(given: Any) -> Iterator[Any]:
    """Yield what was given, what that wraps, and so on down to the model."""
    while True:
        yield given
        _refuse_split(given)
        attribute = next((INSIDE[kind] for kind in INSIDE if kind in _kinds(given)), None)
        if attribute is None or _is_model(given) or not isinstance(given, nn.Module):
            return
        given = getattr(given, attribute)


def _is_model(given: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(given, PreTrainedModel)


def _refuse_split(module: Any) -> None:
    split = next((kind for kind in SPLITS if kind in _kinds(module)), None)
    if split is not None:
        raise ModelError(
            f"{split}: splits a model's weights over processes; gather the model, save_pretrained it, and load it whole"
        )


def _near(given: Any) -> str:
    """What to give instead."""
    for name in ("module", "model"):
        if isinstance(getattr(given, name, None), nn.Module):
            return f"; give the one in its .{name}"
    return "; give one, or the name of its directory"

"""Merging adapters of peft into a model, which is then a whole model again: every zero of its matrices is kept.

The layers merge themselves, as in peft's own `merge_and_unload`; adapters that transformers put into a model, which
has no `merge_and_unload`, are merged in the same way.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ModelError
from ..models.in_memory import (
    adapters,
    eager,
    is_marked,
    model_in_memory,
    plain_name,
    refuse_prompts,
    refuse_quantised,
)
from ..models.matrices import matrices
from .masks import beside_layers

log = logging.getLogger("secateur")


def merge_lora(model: Any) -> PreTrainedModel:
    """Merge the adapters in a model, or in a ``peft.PeftModel``, and keep every zero of its blocks' matrices.

    With adapters of `masked_lora` the merged model computes the same; with others, what they gave through masked
    weights is lost. Modules and tokens that were trained beside them (``modules_to_save``,
    ``trainable_token_indices``) take their places.

    Args:
        model: in memory, with adapters by `masked_lora`, ``peft.get_peft_model`` or ``model.add_adapter``, or opened
            from an adapter's directory; LoRA or whatever else of peft can be merged.

    Returns:
        The model without a trace of them.

    Raises:
        ModelError: there are no adapters in it, or one that cannot be merged; nothing is changed then.
    """
    refuse_prompts(model)
    base = model_in_memory(model)
    refuse_quantised(base)
    with eager(base):
        found = adapters(base)
        if not found and not is_marked(base):
            raise ModelError(f"{type(model).__name__}: has no adapters of LoRA that could be merged")
        _refuse_replicated(base)
        _try_out(base, found)
        heads = _heads(base)
        _untie(base, found)
        while found:  # one may lie inside another
            for name in found:
                _merge(base, name, zeros=name not in heads)
            found = adapters(base)
        _forget(base)
        _tie_again(base)
    return base


def _forget(base: PreTrainedModel) -> None:
    """Take away the marks by which transformers would save adapters, or under their names, in place of the model."""
    for module in base.modules():
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            module.__dict__.pop(mark, None)
    read_as = base.__dict__.get("_weight_conversions") or ()
    if any("base_model.model" in str(getattr(one, "source_patterns", "")) for one in read_as):
        del base._weight_conversions  # an adapter's file was read last; without it, transformers finds the model's own


def _refuse_replicated(base: PreTrainedModel) -> None:
    for config in getattr(base, "peft_config", {}).values():
        if getattr(config, "layer_replication", None):
            raise ModelError(
                f"{type(base).__name__}: its blocks were replicated (layer_replication) and share weights, so adapters "
                "cannot be merged into each; train them on a model that holds every block itself"
            )


def _merge(base: PreTrainedModel, name: str, *, zeros: bool) -> None:
    """Put the merged layer in an adapter's place."""
    layer = base.get_submodule(name)
    gone = _zeros(layer, name) if zeros else {}
    base.set_submodule(name, _merged(layer, name))
    for parameter, zero in gone.items():
        base.get_parameter(parameter).data.masked_fill_(zero, 0)


def _merged(layer: Any, name: str) -> nn.Module:
    """Return a layer, or a wrapper's trained module, with its active adapters merged.

    Raises:
        ModelError: peft cannot.
    """
    adapted = getattr(layer, "token_adapter", layer)
    missing = set(getattr(adapted, "active_adapters", ())) - set(getattr(adapted, "merged_adapters", ()))
    try:
        if hasattr(layer, "unload_and_optionally_merge_module"):
            merged = layer.unload_and_optionally_merge_module(merge=bool(missing), safe_merge=False, adapter_names=None)
        else:
            if missing:
                layer.merge()
            merged = layer.get_base_layer()
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:150] or "peft has no merge for it"
        raise ModelError(f"{name}: an adapter ({type(layer).__name__}) that cannot be merged ({why})") from error
    found: nn.Module = merged
    return found


def _try_out(base: PreTrainedModel, names: list[str]) -> None:
    """Merge a copy of one layer of each kind, to find out what cannot be before anything is changed."""
    seen = set()
    for name in names:
        layer: Any = base.get_submodule(name)
        variants = getattr(layer, "lora_variant", {})
        kind = (type(layer), type(getattr(layer, "base_layer", None)), frozenset(map(type, variants.values())))
        if kind not in seen:
            seen.add(kind)
            try:
                copied = copy.deepcopy(layer)
            except RuntimeError:  # it holds what another adapter computes, as tied ones do
                continue
            _merged(copied, name)


def _zeros(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Where the matrices under an adapter are zero, by the name that each parameter will have when it is merged."""
    beside = set(map(id, beside_layers(layer)))
    return {
        plain_name(matrix.parameter): matrix.weight.detach() == 0
        for matrix in matrices(layer, name).values()
        if id(matrix.module) not in beside and ".modules_to_save." not in matrix.parameter
    }


def _heads(base: PreTrainedModel) -> set[str]:
    """The names of what gives logits: of it no zeros are kept."""
    head = base.get_output_embeddings()
    return {name for name, module in base.named_modules() if head is not None and module is head}


def _untie(base: PreTrainedModel, names: list[str]) -> None:
    """Give a layer that is merged weights of its own where another layer holds the same."""
    places: dict[int, set[tuple[int, str]]] = {}
    for module in base.modules():
        for key, parameter in module._parameters.items():
            places.setdefault(id(parameter), set()).add((id(module), key))
    for name in names:
        layer: Any = base.get_submodule(name)
        adapted = getattr(layer, "token_adapter", layer)
        if hasattr(adapted, "base_layer"):
            for module in adapted.base_layer.modules():
                for key, parameter in module._parameters.items():
                    if parameter is not None and len(places[id(parameter)]) > 1:
                        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                        module._parameters[key] = own


def _tie_again(base: PreTrainedModel) -> None:
    """Have embeddings and head be one tensor, as the config says, or the config say that they are two."""
    configs = [base.config, base.config.get_text_config()]
    words: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    if head is None or not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return
    if words.weight is head.weight:
        return
    if words.weight.dtype == head.weight.dtype and torch.equal(words.weight, head.weight):
        head.weight = words.weight
        return
    for config in configs:
        config.tie_word_embeddings = False
    base.all_tied_weights_keys = base.get_expanded_tied_weights_keys(all_submodels=True)
    log.info("embeddings and head were one tensor and were trained apart: tie_word_embeddings is False now")

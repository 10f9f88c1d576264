"""Tiny models with zeros, dense and packed, for tests of the runtime."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import secateur
from tiny import tiny_model

MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def thin(W_OI, format, seed):
    """Zeros at random places, two of every four along the inputs for nm."""
    g = torch.Generator().manual_seed(seed)
    if format == "nm":
        order = torch.rand(W_OI.shape, generator=g).unflatten(-1, (-1, 4)).argsort(-1).argsort(-1)
        W_OI.masked_fill_(order.flatten(-2) < 2, 0)
    else:
        W_OI.masked_fill_(torch.rand(W_OI.shape, generator=g) < 0.6, 0)


def sparse_model(family, dtype, format):
    model = tiny_model(family, dtype, **MIXTURES.get(family, {}))
    for seed, module in enumerate(model.base_model.modules()):
        if isinstance(module, (nn.Linear, Conv1D)):
            thin(module.weight.data.T if isinstance(module, Conv1D) else module.weight.data, format, seed)
    return model


def made_once(tmp_path_factory, dtypes):
    """``made(family, format, values, dtype)``: directories of a pruned model, dense and packed; to be read only.

    `dtypes` says which dtype a family has if none is asked for.
    """
    known = {}

    def made(family="llama", format="bitmask", values=None, dtype=None):
        key = family, format, values, dtype
        if key not in known:
            folder = tmp_path_factory.mktemp("packed")
            sparse_model(family, dtype or dtypes(family), format).save_pretrained(folder / "dense")
            secateur.pack(folder / "dense", folder / "packed", format=format, values=values)
            known[key] = folder / "dense", folder / "packed"
        return known[key]

    return made

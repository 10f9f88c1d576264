"""Layers whose parts move in memory, are replaced or copied between products."""

import copy
import pickle

import pytest
import torch
from torch import nn

from packings import assert_product, normal, packed, sparse
from secateur.runtime.linear import KernelLinear, PackedLinear


def layer(format="bitmask", values="float32", seed=0):
    """A layer that has computed once, so that the kernels know its parts."""
    found = packed(sparse((50, 300), (2, 4), seed), format, values, (2, 4))
    made = PackedLinear(found.packing, normal(50))
    for suffix, part in found.parts.items():
        setattr(made, f"weight{suffix}", part.clone())
    x = normal(2, 300)
    assert_product(made(x), found, x, made.bias)
    return made, found, x


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_parts_that_move_to_shared_memory(format):
    made, found, x = layer(format)
    for part in made.state_dict().values():
        part.share_memory_()
    if (kernel := made.kernel()) is not None:
        assert kernel._matrix.values == made.weight.data_ptr()
    assert_product(made(x), found, x, made.bias)


def test_parts_whose_data_is_exchanged():
    made, _, x = layer()
    other, found, _ = layer(seed=8)
    for suffix in found.parts:
        getattr(made, f"weight{suffix}").data = getattr(other, f"weight{suffix}").clone()
    assert_product(made(x), found, x, made.bias)


def test_a_mask_that_is_replaced():
    made, _, x = layer()
    W = torch.zeros(50, 300)
    W[:, :2] = normal(50, 2)
    made.weight[: 50 * 2] = packed(W, "bitmask").parts[""]
    made.weight_mask = packed(W, "bitmask").parts["_mask"]
    assert (made(x) - made.bias - x @ W.T).abs().max() < 1e-4


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize(("format", "values"), [("bitmask", "float32"), ("nm", "int8")])
def test_copies_have_parts_of_their_own(format, values, again):
    made, found, x = layer(format, values)
    other = again(made)
    for part in made.state_dict().values():
        part.zero_()
    assert_product(other(x), found, x, other.bias)


def test_a_cast_is_followed():
    made, found, x = layer()
    y = made.to(torch.bfloat16)(x.bfloat16())
    exact = x.bfloat16().double() @ found.weights.bfloat16().double().T + made.bias.double()
    assert y.dtype == torch.bfloat16
    assert ((y - exact).abs() <= exact.abs() / 256 + 1e-4).all()


@torch.no_grad()
def test_a_dense_layer_whose_weight_is_replaced_or_changed():
    made, x = nn.Linear(300, 50), normal(2, 300)
    made.__class__ = KernelLinear
    assert torch.allclose(made(x), nn.functional.linear(x, made.weight, made.bias), atol=1e-5)
    made.weight.mul_(2)
    assert torch.allclose(made(x), nn.functional.linear(x, made.weight, made.bias), atol=1e-5)
    made.weight.data = normal(50, 300)
    assert torch.allclose(made(x), nn.functional.linear(x, made.weight, made.bias), atol=1e-4)
    made.weight.share_memory_()
    assert torch.allclose(made(x), nn.functional.linear(x, made.weight, made.bias), atol=1e-4)


@pytest.mark.parametrize("weight", [normal(300, 50).T, torch.empty(50, 0)], ids=["transposed", "empty"])
@torch.no_grad()
def test_a_dense_layer_of_an_unusual_weight(weight):
    made, x = nn.Linear(3, 50), normal(2, weight.shape[1])
    made.__class__ = KernelLinear
    made.weight, made.in_features = nn.Parameter(weight), weight.shape[1]
    assert torch.allclose(made(x), nn.functional.linear(x, weight, made.bias), atol=1e-4)

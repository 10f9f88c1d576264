"""What `inspect` sees in a checkpoint, dense and pruned."""

import pytest
import torch

import secateur
from secateur.pruning import detect_pattern, magnitude, parse_pattern
from secateur.pruning.statistics import Statistics
from tiny import tensors_of


def pruned(pattern, sparsity=0.5, shape=(64, 96)):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return W * parse_pattern(pattern).mask(magnitude(W, Statistics()), sparsity)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "expected"),
    [
        ("row", 0.0, "dense"),
        ("row", 0.005, "dense"),
        ("row", 0.5, "row"),
        ("row", 0.3, "row"),
        ("matrix", 0.5, "unstructured"),
        ("2:4", 0.5, "2:4"),
        ("1:4", 0.75, "1:4"),
        ("4:8", 0.5, "4:8"),
        ("8:16", 0.5, "8:16"),
        ("16:32", 0.5, "16:32"),
        ("block:4x4", 0.5, "block:4x4"),
        ("block:16x16", 0.5, "block:16x16"),
        ("block:1x8", 0.5, "block:1x8"),
        ("block:32x32", 0.5, "block:32x32"),
    ],
)
def test_patterns_are_recognised(pattern, sparsity, expected):
    assert detect_pattern(pruned(pattern, sparsity)) == expected
    assert detect_pattern(pruned(pattern, sparsity).to(torch.bfloat16)) == expected


def test_odd_shapes():
    assert detect_pattern(torch.ones(1, 1)) == "dense"
    assert detect_pattern(pruned("2:4", shape=(3, 10))) == "2:4"
    assert isinstance(detect_pattern(torch.zeros(4, 6)), str)
    assert detect_pattern(pruned("row", shape=(7, 13))) == "row"


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16")])
def test_a_dense_model(model_directory, family, dtype):
    directory = model_directory(family, dtype)
    found, tensors = secateur.inspect(directory), tensors_of(directory)
    assert (found["model_type"], found["blocks"], found["sparsity"]) == (family, 3, 0.0)
    assert found["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert len(found["matrices"]) == (12 if family == "gpt2" else 21)
    for row in found["matrices"]:
        tensor = tensors[row["name"] + ".weight"]
        assert row["shape"] == list(tensor.T.shape if family == "gpt2" else tensor.shape)
        assert row["bytes"] == tensor.numel() * tensor.element_size()
        assert (row["sparsity"], row["pattern"], row["format"], row["dtype"]) == (0.0, "dense", "dense", dtype)
        assert f".{row['block']}." in row["name"]
    assert found["weights"] == sum(tensors[row["name"] + ".weight"].numel() for row in found["matrices"])


def test_a_pruned_model(tmp_path, model_directory):
    out = tmp_path / "out"
    rules = {"0": "1:4", "1": 0}
    report = secateur.prune(model_directory("gpt2"), out, method="magnitude", pattern="2:4", allocation=rules).report
    found = secateur.inspect(out)
    assert {row["pattern"] for row in found["matrices"] if row["block"] == 0} == {"1:4"}
    assert {row["pattern"] for row in found["matrices"] if row["block"] == 1} == {"dense"}
    assert {row["pattern"] for row in found["matrices"] if row["block"] == 2} == {"2:4"}
    assert found["sparsity"] == pytest.approx(report["sparsity"])
    reached = {row["name"]: row["sparsity"] for row in report["matrices"]}
    assert all(row["sparsity"] == pytest.approx(reached.get(row["name"], 0)) for row in found["matrices"])


def test_what_prune_writes_is_recognised(tmp_path, model_directory):
    secateur.prune(model_directory("llama"), tmp_path / "out", method="magnitude", pattern="block:4x8")
    found = {row["pattern"] for row in secateur.inspect(tmp_path / "out")["matrices"]}
    assert len(found) == 1 and found <= {"block:4x4", "block:1x8"}  # either describes it

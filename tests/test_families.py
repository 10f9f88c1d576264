"""Every family of decoders that transformers has: replay, names and bytes, a full prune, and the README's list."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from families import FAMILIES
from secateur.errors import ModelError
from secateur.models.hosts import DiskHost, block_matrices
from secateur.models.matrices import unreadable
from secateur.models.source import open_checkpoint
from secateur.pipeline.stream import Stream
from secateur.progress import Silent
from tiny import bytes_of, rows, tensors_of

README = Path(__file__).parent.parent / "README.md"


def family_model(kind: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = AutoConfig.for_model(kind, **copy.deepcopy(FAMILIES[kind]))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.02))
    return model


def through_stream(host: DiskHost, ids: torch.Tensor, folder: Path) -> torch.Tensor:
    """The logits by way of one block at a time."""
    stream = Stream(host, list(ids), folder)
    for index in range(len(host.skeleton.real)):
        with host.block(index) as block:
            stream.forward(index, block, Silent())
    return host.skeleton.logits(ids, stream.get(len(host.skeleton.real), 0))


def names_and_bytes_come_back(host: DiskHost) -> bool:
    """Whether every parameter of every block goes back to its names and bytes on disk."""
    for index in range(len(host.skeleton.real)):
        with host.block(index) as block:
            prefix = f"{host.skeleton.path}.{index}."
            back = host.on_disk({prefix + name: p.detach() for name, p in block.named_parameters()})
            if not all(
                torch.equal(tensor.float(), host.checkpoint.read(name).float()) for name, tensor in back.items()
            ):
                return False
            if set(back) - set(host.names[index]):
                return False
    return True


def state_of(kind: str, folder: Path) -> str:
    """Prune one family in every way, check all that can be checked, and say how it went in a few words."""
    from transformers import AutoModelForCausalLM

    model = family_model(kind)
    source, output = folder / "model", folder / "pruned"
    model.save_pretrained(source)
    ids = rows(3, 24, seed=3)
    try:
        report = secateur.prune(source, output, sparsity=0.5, calibration=rows(6, 24), progress=Silent()).report
    except ModelError as error:
        assert not output.exists()
        assert not output.with_name("pruned.secateur").exists()
        return f"refused: {str(error).split(': ', 1)[1]}"

    host = DiskHost(open_checkpoint(source), torch.device("cpu"))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(through_stream(host, ids, folder / "hidden"), expected, rtol=1e-3, atol=1e-4)
    assert names_and_bytes_come_back(host)

    before, after = tensors_of(source), tensors_of(output)
    assert before.keys() == after.keys()
    pruned = {m["name"] for m in report["matrices"]}
    every = {n for i in range(len(host.skeleton.real)) for n in block_matrices(host, i)}
    closed = {n for i, block in enumerate(host.skeleton.real) for n in unreadable(block, f"{host.skeleton.path}.{i}")}
    assert pruned | set(report["left_out"]) == every | closed
    assert not pruned & set(report["left_out"])
    for matrix in report["matrices"]:
        assert matrix["sparsity"] == (matrix["shape"][1] // 2) / matrix["shape"][1]
    parameters = {block_matrices(host, m["block"])[m["name"]].parameter for m in report["matrices"]}
    touched = {name for parameter in parameters for name in host.names_of[parameter]}
    for name in before.keys() - touched:
        assert bytes_of(before[name]) == bytes_of(after[name])

    again, loading = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    live = AutoModelForCausalLM.from_pretrained(source)
    secateur.prune(live, sparsity=0.5, calibration=rows(6, 24), progress=Silent())
    ours, theirs = again.state_dict(), live.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    left = len(report["left_out"])
    return f"pruned; {left} of {len(every | closed)} matrices left dense" if left else "pruned"


@pytest.mark.parametrize("kind", FAMILIES)
def test_family(kind, tmp_path):
    print(f"STATE {kind}: {state_of(kind, tmp_path)}")

"""Every family of decoders that transformers has: replay, names and bytes, a full prune, and the README's list."""

from __future__ import annotations

import copy
import tempfile
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from families import FAMILIES
from secateur.errors import ModelError
from secateur.models.disk_host import DiskHost
from secateur.models.hosts import block_matrices
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
            if not all(bytes_of(tensor) == bytes_of(host.checkpoint.read(name)) for name, tensor in back.items()):
                return False
            if set(back) - set(host.names[index]):
                return False
    return True


def state_of(kind: str, folder: Path) -> str:
    """Prune one family in every way, check all that can be checked, and say how it went in a few words."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(exist_ok=True)
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
    return f"pruned; {left} of {len(every | closed)} matrices stay dense" if left else "pruned"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    return cache(lambda kind: state_of(kind, tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_pruned_or_refused_by_name(kind, state):
    assert state(kind).startswith(("pruned", "refused: "))


def test_the_readme_lists_every_family(state):
    """`make families` writes the list."""
    assert readme_list({kind: state(kind) for kind in FAMILIES}) in README.read_text()


def readme_list(states: dict[str, str]) -> str:
    """The README's list of families."""

    def named(what: str) -> list[str]:
        return [f"`{kind}`" for kind in sorted(states) if states[kind].startswith(what)]

    whole = [name for name in named("pruned") if states[name.strip("`")] == "pruned"]
    partly = [f"`{kind}` ({state[8:]})" for kind, state in sorted(states.items()) if state.startswith("pruned; ")]
    refused = [f"| `{kind}` | {state[9:]} |" for kind, state in sorted(states.items()) if state.startswith("refused")]
    text = (
        f"**Pruned whole** ({len(whole)}): {', '.join(whole)}.\n\n"
        f"**Pruned, but for matrices whose input is never seen** ({len(partly)}): {', '.join(partly)}.\n\n"
        f"**Refused by name** ({len(refused)}):"
    )
    return "\n".join(
        [*(wrap(line, 120) for line in text.split("\n")), "", "| family | reason |", "|---|---|", *refused]
    )


def wrap(line: str, width: int) -> str:
    return "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        mark = "<!-- families -->\n"
        before, _, after = README.read_text().split(mark)
        states = {kind: state_of(kind, Path(folder, kind)) for kind in FAMILIES}
        README.write_text(f"{before}{mark}{readme_list(states)}\n{mark}{after}")

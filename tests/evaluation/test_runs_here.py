"""How packed matrices would run on this machine, as `inspect` says it."""

import io
import json

import pytest
from rich.console import Console

import secateur
from secateur import cli
from secateur.reporting.terminal.tables import inspection_table
from secateur.runtime import arrangement, kernels
from tiny import save_tiny

needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="the kernels were not compiled")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A model pruned in its first two blocks: dense; packed; packed as 2:4 with 8-bit values. To be read only."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "model", "llama")
    rule = {"method": "magnitude", "pattern": "2:4", "allocation": {"layers.2": 0}}
    secateur.prune(folder / "model", folder / "dense", **rule)
    secateur.prune(folder / "model", folder / "packed", format="bitmask", **rule)
    secateur.prune(folder / "model", folder / "rounded", format="nm", values="int8", **rule)
    return folder


@pytest.fixture
def wide_is_faster(monkeypatch):
    def measured(kernel, packing, dtype):
        return {"kernel": 1.0 if kernel.columns > 32 else 2.0, "torch": 1.5}

    monkeypatch.setattr(arrangement, "measured", measured)


def runs(directory):
    return {row["name"]: row["runs"] for row in secateur.inspect(directory)["matrices"]}


def shown(directory):
    console = Console(file=io.StringIO(), width=200)
    console.print(inspection_table("m", secateur.inspect(directory)))
    return console.file.getvalue()


@needs_kernels
def test_what_is_measured_decides_for_each_packed_matrix(directories, wide_is_faster):
    found = runs(directories / "packed")
    packed = {name for name, how in found.items() if how == "packed"}
    assert packed == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)} and len(found) == 21


@needs_kernels
def test_it_is_what_loading_for_speed_does(directories, wide_is_faster, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("SECATEUR_PREFER", "speed")
    model = AutoModelForCausalLM.from_pretrained(directories / "packed", dtype="auto")
    loaded = {n for n, m in model.named_modules() if type(m).__name__ == "PackedLinear"}
    assert loaded == {name for name, how in runs(directories / "packed").items() if how == "packed"} != set()


def test_8_bit_values_run_packed_and_what_is_dense_runs_dense(directories, wide_is_faster):
    for name, how in runs(directories / "rounded").items():
        assert how == ("dense" if ".layers.2." in name else "packed")
    assert set(runs(directories / "dense").values()) == {"dense"}


def test_without_kernels_only_8_bit_values_run_packed(directories, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr("secateur.evaluation.inspection.library", lambda: None)
    assert set(runs(directories / "packed").values()) == {"dense"}
    assert set(runs(directories / "rounded").values()) == {"packed", "dense"}


@needs_kernels
def test_the_table_says_it_of_packed_checkpoints(directories, wide_is_faster):
    text = shown(directories / "packed")
    assert "runs here" in text
    cells = {line.split("│")[1].strip(): line.split("│")[7].strip() for line in text.splitlines() if "_proj" in line}
    assert cells["mlp.down_proj"] == "dense, packed" and cells["mlp.up_proj"] == "dense"
    assert "runs here" not in shown(directories / "dense")


def test_the_command_prints_it_as_json(directories, capsys):
    assert cli.main(["-q", "inspect", str(directories / "rounded"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["matrices"]
    assert {row["runs"] for row in rows if row["format"] == "nm"} == {"packed"}
    assert {row["runs"] for row in rows if row["format"] == "dense"} == {"dense"}

"""The process belongs to its caller: its settings reach no result, and ours reach no other thread."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import secateur
from secateur.evaluation.quiet import LOUD
from secateur.progress import Silent
from tiny import TEXT, edit_json, rows, same_bytes, save_tiny, tensors_of

IDS = rows(20, 20)
SECATEUR = Path(sys.executable).with_name("secateur")


@contextmanager
def other_dtypes() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def other_modes() -> Iterator[None]:
    with torch.inference_mode(), torch.device("meta"):
        yield


SETTINGS = {"default dtype and autocast": other_dtypes, "inference mode and default device": other_modes}
every_setting = pytest.mark.parametrize("setting", SETTINGS)

PRUNING: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "default": {},
    "ria": {"method": "ria"},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "alps": {"method": "alps"},
    "swaps": {"method": "wanda+swaps+obs"},
    "sequential": {"method": "sparsegpt", "propagate": "sequential"},
    "reconstruct": {"method": "wanda", "reconstruct": secateur.Reconstruction(epochs=1, batch_tokens=40)},
    "owl": {"method": "wanda", "allocation": "owl"},
    "alpha": {"method": "wanda", "allocation": "alpha"},
    "linear": {"method": "wanda", "allocation": "linear"},
}


@every_setting
@pytest.mark.parametrize("options", PRUNING.values(), ids=PRUNING)
def test_settings_of_the_caller_change_no_pruned_weight(setting, options, model_directory, tmp_path):
    options = {"calibration": IDS, "progress": Silent(), **options}
    secateur.prune(model_directory(), tmp_path / "plain", **options)
    live = AutoModelForCausalLM.from_pretrained(model_directory())
    with SETTINGS[setting]():
        secateur.prune(model_directory(), tmp_path / "disk", **options)
        secateur.prune(live, **options)
    expected = tensors_of(tmp_path / "plain")
    assert same_bytes(tensors_of(tmp_path / "disk"), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    for name, tensor in live.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor == 0, again[name] == 0)
        torch.testing.assert_close(tensor, again[name], rtol=1e-5, atol=1e-6)
    live(input_ids=IDS, labels=IDS).loss.backward()  # and it can still be trained


@every_setting
def test_settings_of_the_caller_change_no_other_command(setting, model_directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 10, encoding="utf-8")
    quiet = {"progress": Silent()}
    pruned = tmp_path / "pruned"
    secateur.prune(model_directory(), pruned, method="magnitude", pattern="2:4", **quiet)

    def results(folder: Path) -> list[Any]:
        found: list[Any] = [secateur.evaluate(pruned, text=str(text), seqlen=16, against=model_directory(), **quiet)]
        secateur.shrink(model_directory(), folder / "small", neurons=0.5, round=8, calibration=IDS, **quiet)
        secateur.finetune(pruned, folder / "trained", IDS, steps=2, batch_size=1, train="full", **quiet)
        secateur.pack(pruned, folder / "packed", **quiet)
        secateur.unpack(folder / "packed", folder / "unpacked", **quiet)
        kinds = ("small", "trained", "packed", "unpacked")
        return [found[0]["loss"], found[0]["fidelity"], *(tensors_of(folder / kind) for kind in kinds)]

    plain = results(tmp_path / "a")
    with SETTINGS[setting]():
        other = results(tmp_path / "b")
    assert plain[:2] == other[:2]
    assert all(same_bytes(one, two) for one, two in zip(plain[2:], other[2:], strict=True))


def test_a_model_of_inference_mode_is_pruned_there(model_directory):
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(model_directory())
        secateur.prune(model=model, method="wanda", calibration=IDS, progress=Silent())
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5


class Elsewhere(threading.Thread):
    """Another thread of the caller's program, which makes modules all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.odd: list[Any] = []

    def run(self) -> None:
        while not self.over.is_set():
            layer = nn.Linear(2, 2)
            if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32:
                self.odd.append(layer.weight)

    def __enter__(self) -> Elsewhere:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()


def test_several_threads_at_once(model_directory, tmp_path):
    source = model_directory("llama", "bfloat16")
    environment = dict(os.environ)

    def work(number: int) -> Any:
        out, quiet = tmp_path / f"out-{number}", {"progress": Silent()}
        kind = number % 4
        if kind == 0:
            return secateur.prune(source, out, method="wanda", calibration=IDS, **quiet).report["sparsity"]
        if kind == 1:
            model = AutoModelForCausalLM.from_pretrained(model_directory())
            return secateur.prune(model, method="wanda", calibration=IDS, **quiet).report["sparsity"]
        if kind == 2:
            secateur.prune(source, out, method="magnitude", **quiet)
            secateur.pack(out, tmp_path / f"packed-{number}", **quiet)
            return secateur.inspect(tmp_path / f"packed-{number}")["sparsity"]
        return secateur.shrink(source, out, layers=1, depth="influence", calibration=IDS, **quiet)["removed_layers"]

    with Elsewhere() as other, ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, range(12)))
    alone = [work(number) for number in range(20, 24)]
    assert together == alone * 3
    assert not other.odd
    assert torch.get_default_dtype() == torch.float32
    assert transformers_logging.is_progress_bar_enabled()
    assert dict(os.environ) == environment
    assert same_bytes(tensors_of(tmp_path / "out-0"), tensors_of(tmp_path / "out-20"))


def test_what_is_global_in_libraries_is_given_back(model_directory, tmp_path, capsys):
    """Random numbers, warnings, logging, matplotlib's settings and stdout, however many threads are at work."""
    import matplotlib

    text, data = tmp_path / "text.txt", {"progress": Silent()}
    text.write_text(TEXT * 10, encoding="utf-8")
    pruned = tmp_path / "pruned"
    secateur.prune(model_directory(), pruned, method="magnitude", pattern="2:4", **data)
    piqa = {"goal": "cut", "sol1": "a bud", "sol2": "a tree", "label": 0}
    (tmp_path / "piqa.validation.jsonl").write_text("\n".join([json.dumps(piqa)] * 4), encoding="utf-8")

    def work(number: int) -> Any:
        if number % 3 == 0:
            out = tmp_path / f"out-{number}"
            secateur.finetune(pruned, out, IDS, steps=2, batch_size=1, train="full", **data)
            return {name: tensor.tolist() for name, tensor in tensors_of(out).items()}
        if number % 3 == 1:
            secateur.report(pruned, output=tmp_path / f"{number}.html")
            return (tmp_path / f"{number}.html").is_file()  # of what was recorded by then
        return secateur.evaluate(pruned, tasks=["piqa"], task_data=tmp_path, **data)["tasks"]["results"]

    alone = [work(number) for number in range(3)]

    def settings() -> list[Any]:
        seeds = random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
        levels = logging.root.manager.disable, *(logging.getLogger(name).level for name in LOUD)
        return [seeds, list(warnings.filters), levels, dict(matplotlib.rcParams), sys.stdout]

    before = settings()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, (5, 8, 3, 4, 6, 7)))
    assert settings() == before
    assert together == [alone[number % 3] for number in (5, 8, 3, 4, 6, 7)]
    assert capsys.readouterr().out == ""


def test_an_error_leaves_the_process_usable(model_directory, tmp_path):
    class Fails(Silent):
        def advance(self, done: float = 1, note: str | None = None) -> None:
            raise RuntimeError("of the caller's own")

    for model, output in ((str(model_directory()), tmp_path / "out"), (tmp_path / "none", tmp_path / "out")):
        with pytest.raises((RuntimeError, secateur.ModelError)):
            secateur.prune(model, output, method="wanda", calibration=IDS, progress=Fails())
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    report = secateur.prune(model_directory(), tmp_path / "out", method="magnitude", progress=Silent()).report
    assert report["sparsity"] == 0.5


def shell(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "MPL"))}
    own |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    words = tuple(map(str, (SECATEUR, *words)))
    return subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", env=own)


def test_files_are_utf_8_whatever_the_locale_is(tokenizer, tmp_path):
    model = save_tiny(tmp_path / "model", "llama", tokenizer=tokenizer)
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {"id2label": {"0": "café"}}
    (model / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    rules = tmp_path / "rules.yaml"
    rules.write_text("# не трогать\nlayers.0: 0\n", encoding="utf-8")
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out, packed = tmp_path / "out", tmp_path / "packed"
    for words in (
        ("prune", model, out, "--method", "magnitude", "--allocation", rules),
        ("pack", out, packed),
        ("prune", "--help"),
    ):
        done = shell(*words, **locale)
        assert done.returncode == 0, (words, done.stderr)
    written = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    assert written["id2label"] == {"0": "café"}


def test_a_home_where_nobody_may_write(model_directory, tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT] * 4}), tmp_path / "text.parquet")
    options = ("--method", "wanda", "--calibration", tmp_path / "text.parquet", "--samples", 2, "--seqlen", 16)
    done = shell("prune", model_directory(), tmp_path / "out", *options, HOME="/proc/nobody")
    assert done.returncode == 0, done.stderr


def test_names_of_a_config_are_kept(tokenizer, tmp_path):
    """A config that is written anew says what it said."""
    model = save_tiny(tmp_path / "model", "llama", tokenizer=tokenizer)
    edit_json(model / "config.json", task_specific_params={"größe": "näh"})
    secateur.prune(model, tmp_path / "out", method="magnitude", dtype="bfloat16", progress=Silent())
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["task_specific_params"] == {"größe": "näh"}

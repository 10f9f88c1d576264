"""The real SmolLM2-135M, once, by the commands that the README shows."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.cli import main
from secateur.models.gguf import as_checkpoint
from secateur.models.source import locate

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LITTLE = "--samples 4 --seqlen 64 --exclude layers\\.([4-9]|[12][0-9])\\."


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    return as_checkpoint(locate("smollm2"), tmp_path_factory.mktemp("smollm2"))


def test_the_quick_start_works(smollm2, monkeypatch):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert HUB_ID in code
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: load({HUB_ID: smollm2}[name]))
    names: dict = {}
    exec(code, names)
    zeros = sum(int((m.weight == 0).sum()) for m in names["model"].model.layers.modules() if hasattr(m, "in_features"))
    assert zeros == 106_168_320 // 2


def test_the_command_works(smollm2, tmp_path, monkeypatch, capsys):
    line = next(line for line in README.splitlines() if line.startswith("secateur prune"))
    line = line.replace(HUB_ID, str(smollm2)).replace("--calibration c4", f"--calibration sotu:train {LITTLE}")
    line = line.replace("wikitext2", "sotu:test")
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(line.replace("\\", "\\\\"))[1:], "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "pruned" / "secateur.json").read_text())
    assert report["sparsity"] == 0.5
    assert report["weights"] == 4 * 3_538_944
    before, after = report["evaluation"]["before"], report["evaluation"]["after"]
    assert (before["text"], before["windows"], before["tokens"]) == ("sotu:test", 40, 40 * 64)
    assert 10 < before["perplexity"] < after["perplexity"] < 1000

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert model.dtype is torch.bfloat16
    found = secateur.inspect(tmp_path / "pruned")
    patterns = {row["block"]: row["pattern"] for row in found["matrices"]}
    assert [patterns[index] for index in (0, 3, 4, 29)] == ["row", "row", "dense", "dense"]
    assert main(["generate", str(tmp_path / "pruned"), "The", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("The")

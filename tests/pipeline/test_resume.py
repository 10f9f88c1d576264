"""A run that was killed, interrupted or ran out of disk goes on to the very same bytes, and harms nothing meanwhile."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dying_runs
import secateur
from dying_runs import SCENARIOS, result
from secateur.errors import ModelError, OutputError, ResumeError, SecateurError
from secateur.progress import Silent
from tiny import Interrupts, files_below, same_bytes, save_tiny, tensors_of

ROWS = [torch.arange(3, 3 + n) for n in (24, 24, 17, 17, 17)]
KILLER = Path(dying_runs.__file__)


def unfinished(model, out, steps=6, **options):
    """A run that was interrupted in its second block."""
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out, **{"calibration": ROWS, **options}, progress=Interrupts(steps))
    assert not out.exists()
    journal = (out.with_name("out.secateur") / "journal.jsonl").read_text()
    assert [line["block"] for line in map(json.loads, journal.splitlines()) if "block" in line] == [0]


# Killed at every point.


@pytest.fixture(scope="module")
def killed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(KILLER), str(model), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(killed, scenario):
    points, problems = killed[scenario]["points"], killed[scenario]["problems"]
    assert sum(points.values()) > 8
    assert problems == []


# Interrupted.


@pytest.mark.parametrize("family", ["llama", "gemma4_text"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, family):
    """Or never begins: the blocks of Gemma 4 hand keys and values on to later blocks."""
    options = {}
    if family == "gemma4_text":
        kinds = ["sliding_attention", "full_attention"] * 2
        options = {"num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
        options |= {"layer_types": kinds, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128}
    source = save_tiny(tmp_path / "source", family, **options)
    try:
        secateur.prune(source, tmp_path / "whole", calibration=ROWS)
    except ModelError as error:
        assert family != "llama" and "share" in str(error)  # noqa: PT017  (refused from the start, that is)
        return
    for steps in range(1, 100):
        out = tmp_path / f"out{steps}"
        try:
            secateur.prune(source, out, calibration=ROWS, progress=Interrupts(steps))
            break
        except KeyboardInterrupt:
            secateur.prune(source, out, calibration=ROWS)
        assert same_bytes(tensors_of(out), tensors_of(tmp_path / "whole")), steps
        shutil.rmtree(out)
    assert steps > 12


def test_an_error_in_a_later_block_leaves_what_can_be_used(model, out):
    class Breaks(Interrupts):
        def advance(self, done=1, note=None):
            try:
                super().advance(done, note)
            except KeyboardInterrupt:
                raise RuntimeError from None

    with pytest.raises(RuntimeError):
        secateur.prune(model, out, calibration=ROWS, progress=Breaks(10))
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.secateur"]
    secateur.prune(model, out, calibration=ROWS)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


# Going on with other options.

CHANGES = {
    "method": ({"method": "ria", "pattern": "row"}, ["method", "'wanda+pcg'", "'ria'"]),
    "sparsity": ({"sparsity": 0.25}, ["sparsity", "0.5", "0.25"]),
    "pattern": ({"pattern": "matrix"}, ["pattern", "'row'", "'matrix'"]),
    "propagate": ({"propagate": "dense"}, ["propagate", "'block'", "'dense'"]),
    "dtype": ({"dtype": "float32"}, ["dtype", "'auto'", "'float32'"]),
    "samples": ({"samples": 3}, ["samples", "5", "3"]),
    "calibration": ({"calibration": [row + 1 for row in ROWS]}, ["calibration", "digest"]),
    "include": ({"include": "mlp"}, ["include", "[]", "['mlp']"]),
    "exclude": ({"exclude": ["up", "down"]}, ["exclude", "[]", "['up', 'down']"]),
    "allocation": ({"allocation": {"1": 0.25}}, ["allocation", "'uniform'", "0.25"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_refused_by_name(model, out, change):
    options, said = CHANGES[change]
    unfinished(model, out)
    before = files_below(out.parent)
    with pytest.raises(ResumeError) as caught:
        secateur.prune(model, out, **{"calibration": ROWS, **options})
    message = str(caught.value)
    assert all(word in message for word in [*said, "--no-resume"]) and "\n" not in message
    assert files_below(out.parent) == before
    secateur.prune(model, out, **{"calibration": ROWS, **options}, resume=False)
    secateur.prune(model, out.with_name("fresh"), **{"calibration": ROWS, **options})
    assert same_bytes(tensors_of(out), tensors_of(out.with_name("fresh")))
    assert sorted(p.name for p in out.parent.iterdir()) == ["fresh", "out"]


def test_another_text_to_evaluate_on_is_measured_before_and_after(model, out, tmp_path):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text, word in zip(texts, ("branch", "bud"), strict=True):
        text.write_text(f"A good cut is small, clean and made just above a {word}. " * 60)
    unfinished(model, out, evaluate=str(texts[0]), seqlen=16)
    found = secateur.prune(model, out, calibration=ROWS, evaluate=str(texts[1]), seqlen=16).report["evaluation"]
    assert [found[when]["text"] for when in ("before", "after")] == ["two.txt", "two.txt"]


def test_a_live_model_is_not_touched_for_an_output_with_an_unfinished_run(model, out):
    unfinished(model, out)
    live = AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    with pytest.raises(OutputError, match="unfinished run"):
        secateur.prune(live, out, calibration=ROWS)
    assert same_bytes(before, live.state_dict())


def test_another_model_is_refused_by_its_digest(tmp_path, model, out):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    unfinished(source, out)
    save_tiny(source, "llama", "bfloat16", max_shard_size="24KB", rms_norm_eps=0.1)
    with pytest.raises(ResumeError, match="model digest"):
        secateur.prune(source, out, calibration=ROWS)


SAME = {
    "seed of rows that are not cut": {"seed": 1},
    "number of samples said out loud": {"samples": 5},
    "model spelled otherwise": {},
    "evaluation": {"evaluate": "text.txt", "seqlen": 16},
    "progress": {"progress": Silent()},
}


@pytest.mark.parametrize("kind", SAME)
def test_what_changes_nothing_is_no_other_plan(model, out, kind, monkeypatch):
    monkeypatch.chdir(out.parent)
    (out.parent / "text.txt").write_text("A good cut is small. " * 20)
    unfinished(model, out)
    other = os.path.relpath(model) if kind == "model spelled otherwise" else model
    for _ in range(2):  # goes on; finds it finished
        secateur.prune(other, out, calibration=ROWS, **SAME[kind])


def test_a_damaged_block_is_not_taken(model, out):
    unfinished(model, out)
    block = out.with_name("out.secateur") / "blocks" / "0000.safetensors"
    os.truncate(block, block.stat().st_size - 8)
    with pytest.raises(SecateurError, match=r"0000\.safetensors"):
        secateur.prune(model, out, calibration=ROWS)
    assert not out.exists()


def test_a_torn_journal_is_read_as_far_as_it_is_whole(model, out):
    unfinished(model, out, steps=10)
    journal = out.with_name("out.secateur") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"block": 1, "matr\0\0\0')
    with pytest.raises(KeyboardInterrupt):  # in its third block, with the second noted behind what was torn
        secateur.prune(model, out, calibration=ROWS, progress=Interrupts(6))
    secateur.prune(model, out, calibration=ROWS)
    secateur.prune(model, out.with_name("fresh"), calibration=ROWS)
    assert result(out) == result(out.with_name("fresh"))


# Out of disk.


@pytest.mark.parametrize("name", ["fsync", "replace", "mkdir"])
def test_a_full_disk_is_a_named_error_and_the_run_goes_on_later(model, out, monkeypatch, name):
    fresh = out.with_name("fresh")
    secateur.prune(model, fresh, calibration=ROWS)
    real, left = getattr(os, name), 0

    def full(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and str(out) in str(args[0] if name != "fsync" else out):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    for first in range(1, 100):
        left = first
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            try:
                secateur.prune(model, out, calibration=ROWS)
            except (OutputError, ModelError) as error:
                assert os.strerror(errno.ENOSPC) in str(error)  # noqa: PT017
                assert not out.exists()
        if out.exists() and left > 0:
            break
        secateur.prune(model, out, calibration=ROWS)
        assert result(out) == result(fresh)
        shutil.rmtree(out)
    assert first > 3

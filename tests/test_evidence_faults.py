"""What goes wrong with eval, compare, report and --max-loss is one line and loses nothing: docs/faults.md, Evidence."""

import errno
import io
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

import secateur
from secateur import cli
from secateur.api import measuring
from secateur.errors import OptionError, OutputError
from secateur.evaluation import subject
from secateur.evaluation.place import WORK
from secateur.pipeline import files
from secateur.reporting.markdown.comparison import comparison_markdown
from secateur.reporting.terminal import progress
from secateur.reporting.terminal.evidence import comparison_table, evaluation_table
from test_faults import Disk, everything
from tiny import TEXT, Interrupts, save_tiny, tiny_tokenizer

ROOT = Path(__file__).parent.parent
ON = ("--text", "text.txt", "--seqlen", 16, "--windows", 4)
FROM = ("--calibration", "text.txt", "--samples", 4)
ONE = ("compare", "MODEL", *ON, *FROM, "--methods", "magnitude", "--no-record")
TIMES = ("seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A directory of the test's own with a text, for relative names; and `main` leaves no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)
    Path("text.txt").write_text(TEXT * 10, encoding="utf-8")
    log = logging.getLogger("secateur")
    former = log.handlers, log.level, log.propagate
    yield tmp_path
    log.handlers, log.level, log.propagate = former


@pytest.fixture(scope="module")
def model(model_directory):
    return model_directory("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def others(tmp_path_factory, model_directory, tokenizer):
    """Models that differ from `model` in what keeps them from being compared with it."""
    folder = tmp_path_factory.mktemp("others")
    small = {"num_hidden_layers": 2, "tokenizer": tokenizer}
    foreign = tiny_tokenizer()
    foreign.add_tokens(["gardener"])
    return {
        "MUTE": model_directory("mistral"),
        "SHORT": save_tiny(folder / "short", "llama", **small, max_position_embeddings=32),
        "WIDE": save_tiny(folder / "wide", "llama", **small, vocab_size=160),
        "FOREIGN": save_tiny(
            folder / "foreign", "llama", num_hidden_layers=2, tokenizer=foreign, vocab_size=len(foreign)
        ),
    }


@pytest.fixture
def run(capsys, model, others):
    """``run("eval", "MODEL", ...)``: exit code, stdout, stderr."""

    def command(*words):
        capsys.readouterr()  # of what was made before
        named = {"MODEL": model, **others}
        code = cli.main([str(named.get(word, word)) for word in words])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def told(run):
    """``told("eval", ...)``: the one line that is told, after checking that nothing else is."""

    def line(*words, code=1):
        found, out, err = run("-q", *words)
        assert (found, out) == (code, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert "--debug shows where" not in err and len(err) < 900, err
        return err

    return line


def rows_of(folder):
    """The rows of a comparison, but for their times."""
    rows = json.loads(Path(folder, "comparison.json").read_text(encoding="utf-8"))["rows"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def measured(folder):
    """What was measured, each line once."""
    lines = [json.loads(line) for line in Path(folder, "measurements.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = [json.dumps([line["cell"], line["what"], line["settings"]]) for line in lines]
    assert len(set(keys)) == len(keys)
    return sorted(keys)


# Wrong from the start: one line, and as if nothing had been asked.

EVAL = {
    "no windows": (("MODEL", *ON, "--windows", 0), ["windows 0", "at least 1"]),
    "more windows than there are": (("MODEL", *ON, "--windows", 999), ["windows 999", "text.txt has 121 windows"]),
    "a window beyond the context": (("MODEL", *ON, "--seqlen", 65), ["seqlen 65", "context of 64"]),
    "more texts than windows": (("MODEL", *ON, "--generations", 9), ["generations 9", "has 4 windows"]),
    "less than no text": (("MODEL", *ON, "--generations", -1), ["generations -1", "0 for none"]),
    "no context left": (("SHORT", *ON, "--seqlen", 32, "--generations", 1), ["context of 32 tokens", "no room"]),
    "an empty task": (("MODEL", "--tasks", ""), ["tasks: name at least one", "no empty one"]),
    "options of tasks": (("MODEL", "--limit", 3), ["limit", "name some, such as --tasks"]),
    "windows of no text": (("MODEL", "--tasks", "arc_easy", "--windows", 3), ["windows are of a text", "--text"]),
    "seqlen of no text": (("MODEL", "--tasks", "arc_easy", "--seqlen", 8), ["windows are of a text", "--text"]),
    "no dense model": (("MODEL", *ON, "--against", "nowhere/at/all"), ["nowhere/at/all: no such file or directory"]),
    "an empty dense model": (("MODEL", *ON, "--against", ""), ["MODEL is empty"]),
    "no tokenizer": (("MUTE", *ON), ["text needs a tokenizer"]),
    "a dense model without tokenizer": (("MODEL", *ON, "--against", "MUTE"), ["text needs a tokenizer"]),
    "another tokenizer": (("MODEL", *ON, "--against", "FOREIGN"), ["different tokens", "one tokenizer?"]),
    "another context": (
        ("MODEL", "--text", "text.txt", "--against", "SHORT"),
        ["different tokens", "their windows have 32 and 64 tokens; give --seqlen 32"],
    ),
}


@pytest.mark.parametrize("fault", EVAL)
def test_what_eval_cannot_be_asked(place, told, fault, monkeypatch):
    """None of it costs the hours that perplexity or tasks of the dense model take."""
    monkeypatch.setattr(measuring, "answer", lambda *args, **options: pytest.fail("asked before it was checked"))
    before = everything(place)
    line = told("eval", *EVAL[fault][0])
    assert all(word in line for word in EVAL[fault][1]), line
    assert everything(place) == before


def test_another_vocabulary(told):
    assert "vocabularies differ: 128 and 160" in told("eval", "MODEL", *ON, "--against", "WIDE")


def test_without_the_extra(place, told, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    before = everything(place)
    for words in (("eval", "MODEL"), ONE):
        assert "lm-eval, which asks them, is not installed; pip install 'secateur[eval]'" in told(
            *words, "--tasks", "arc_easy"
        )
    assert everything(place) == before


COMPARE = {
    "a method misspelled": (("--methods", "wnada"), ["unknown method 'wnada'", "did you mean wanda?"]),
    "no method": (("--methods", ""), ["methods: give at least one"]),
    "an empty method": (("--methods", "wanda,"), ["methods: give at least one", "no empty one"]),
    "no sparsity": (("--sparsities", ""), ["''", "no number"]),
    "no pattern": (("--patterns", ""), ["patterns: give at least one"]),
    "no calibration": (("--calibration", ""), ["calibrations: give at least one"]),
    "a sparsity in percent": (("--sparsities", "50"), ["sparsity 50", "for 50 percent write 0.5"]),
    "sparsity against patterns": (
        ("--patterns", "2:4,1:4", "--sparsities", "0.6"),
        ["sparsities 0.6", "2:4, 1:4", "leave it out"],
    ),
    "no samples": (("--samples", "0", "--methods", "wanda"), ["samples 0", "at least 1"]),
    "no threads": (("--threads", "0"), ["threads 0", "at least 1"]),
    "threads without end": (("--threads", "99999999999"), ["threads 99999999999", "1024"]),
    "a format for other patterns": (("--format", "nm"), ["format nm", "use bitmask"]),
    "an empty task": (("--tasks", ""), ["tasks: name at least one"]),
    "a text misspelled": (("--text", "stou"), ["'stou'", "did you mean sotu"]),
    "too many windows": (("--windows", 999), ["windows 999", "121"]),
    "more texts than windows": (("--generations", 9), ["generations 9", "has 4 windows"]),
}


@pytest.mark.parametrize("fault", COMPARE)
def test_what_cannot_be_compared(place, told, fault):
    before = everything(place)
    words, said = COMPARE[fault]
    line = told(*ONE, *words, code=2 if "''" in said else 1)
    assert all(word in line for word in said), line
    assert everything(place) == before


@pytest.mark.parametrize("word", ["x", "", "1,", "0.5"])
def test_seeds_that_are_no_numbers(told, word):
    assert "no list of whole numbers" in told(*ONE, "--seeds", word, code=2)


@pytest.mark.parametrize("name", ["nowhere/at/all", "MUTE", "text.txt", ""])
def test_a_model_that_cannot_be_opened(place, told, name):
    before = everything(place)
    told("compare", name, *ONE[2:])
    assert everything(place) == before


def test_no_model_at_all():
    with pytest.raises(OptionError, match="models: give at least one"):
        secateur.compare([])


def test_a_comparison_of_errors_alone_replaces_none(run, told, place):
    """Neither a model that is gone nor a calibration that is not there takes away what was found before."""
    assert run(*ONE)[0] == 0
    before = everything(place)
    told("compare", "nowhere/at/all", *ONE[2:])
    told("compare", "nowhere/at/all", "MUTE", *ONE[2:])
    assert everything(place) == before


def test_one_calibration_of_two_is_missing(run):
    code, _, err = run(*ONE, "--methods", "wanda", "--calibration", "missing.txt,text.txt")
    assert code == 0 and re.search("^warning: .*'missing.txt': neither a file", err, re.M)
    dense, missing, found = rows_of("comparison")
    assert "missing.txt" in missing["error"] and missing["evaluation"] is None
    assert found["error"] is None and found["perplexity_ratio"] == pytest.approx(
        found["evaluation"]["perplexity"] / dense["evaluation"]["perplexity"]
    )
    code, out, err = run("-q", *ONE, "--methods", "wanda", "--calibration", "missing.txt")
    assert (code, out, err.count("\n")) == (1, "", 1) and "missing.txt" in err


# Nothing in silence that was not asked for.


def test_a_text_of_fewer_windows_than_usual(run):
    """40 are taken, or as many as there are; nobody asked for 40."""
    Path("few.txt").write_text(TEXT, encoding="utf-8")
    words = ("compare", "MODEL", "--text", "few.txt", "--seqlen", 16, *FROM, "--methods", "magnitude")
    assert run(*words)[0] == 0
    assert rows_of("comparison")[0]["evaluation"]["windows"] == 12


def test_the_command_that_is_told_can_be_given(run, model):
    run(*ONE)
    command = json.loads(Path("comparison/comparison.json").read_text(encoding="utf-8"))["command"]
    assert command == (
        f"secateur compare {model} --methods magnitude --calibration text.txt --samples 4 --seqlen 16 --text text.txt "
        "--windows 4 --no-record"
    )


def test_a_model_named_twice_is_shown_once(run):
    run("compare", "MODEL", *ONE[1:])
    assert [row["method"] for row in rows_of("comparison")] == ["dense", "magnitude"]


def test_models_of_one_name_are_told_apart(run, model):
    for folder in ("one", "two"):
        shutil.copytree(model, f"{folder}/tiny")
    paths = [Path(folder, "tiny").resolve() for folder in ("one", "two")]
    run("compare", *paths, *ONE[2:])
    page = Path("comparison/comparison.md").read_text(encoding="utf-8")
    assert page.startswith("# 2 models") and all(f"| `{path}` |" in page for path in paths)
    document = json.loads(Path("comparison/comparison.json").read_text(encoding="utf-8"))
    alone = {**document, "rows": document["rows"][:2]}
    assert comparison_markdown(alone).startswith("# tiny, dense")


# Where a comparison lives.


def test_somebody_elses_directory(place, told):
    theirs = Path("mine", WORK, "thesis.txt")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("years of it", encoding="utf-8")
    Path("mine/lock").write_text("a key", encoding="utf-8")
    before = everything(place)
    assert "mine: is not empty and holds no measurements.jsonl; choose another" in told(*ONE, "-o", "mine")
    assert "text.txt: is a file; give a directory" in told(*ONE, "-o", "text.txt")
    assert "Not a directory); a file stands where a directory is needed" in told(*ONE, "-o", "text.txt/x")
    assert everything(place) == before


def test_a_directory_where_nobody_may_write(place, told, monkeypatch):
    def refuse(self, *args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    before = everything(place)
    monkeypatch.setattr(Path, "mkdir", refuse)
    line = told(*ONE)
    assert "comparison: cannot be written (Read-only file system); check who may write there" in line
    assert everything(place) == before


def test_two_comparisons_in_one_directory(place, run, told):
    Path("comparison").mkdir()
    with FileLock("comparison/lock"):
        before = everything(place)
        assert "another process measures there; wait for it or choose another place" in told(*ONE)
        assert everything(place) == before
    assert run(*ONE)[0] == 0
    assert sorted(os.listdir("comparison")) == ["comparison.json", "comparison.md", "measurements.jsonl"]


@pytest.mark.parametrize("line", ["{", "[]", "{}", "5", '{"cell": {}, "what": "x", "settings": {}, "result": 5}', "\0"])
def test_damaged_measurements(place, run, told, line):
    run(*ONE)
    path = Path("comparison/measurements.jsonl")
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound + line + "\n", encoding="utf-8")
    before = everything(place)
    said = told(*ONE)
    assert f"measurements.jsonl: line {1 + sound.count(chr(10))} is damaged; remove that line" in said
    after = everything(place)
    after.pop("comparison/lock", None)
    assert after == before
    path.write_text(sound + '{"cell": {"mod', encoding="utf-8")  # a kill tears no more than the last line
    assert run(*ONE)[0] == 0 and path.read_text(encoding="utf-8") == sound


# What stops a comparison, and going on.


def test_a_journal_never_holds_half_a_line(place, monkeypatch):
    journal = files.Journal(place / "journal.jsonl")
    journal.note({"first": 1})
    with monkeypatch.context() as patch:
        Disk(place, 2).install(patch)
        with pytest.raises(OutputError, match="No space left"):
            journal.note({"second": 2})
    journal.note({"third": 3})
    assert files.Journal(journal.path).lines == [{"first": 1}, {"third": 3}]


def test_a_full_disk_stops_a_comparison_and_the_same_command_goes_on(place, run, told, monkeypatch):
    """A full disk is every cell's: it does not prune the next one in vain."""
    words = (*ONE, "--methods", "magnitude,wanda", "--generations", 1)
    assert run(*words, "-o", "sound")[0] == 0
    reference, keys = rows_of("sound"), measured("sound")
    disk = Disk(place)
    with monkeypatch.context() as patch:
        disk.install(patch)
        run(*words, "-o", "again")
    own = [n for n, (_, path) in enumerate(disk.writes, 1) if "work/" not in path or path.endswith("even.bin")]
    assert len(own) > 20
    for full_at in [*own[:3], *own[3::9]]:
        shutil.rmtree("out", ignore_errors=True)
        disk = Disk(place, full_at)
        with monkeypatch.context() as patch:
            disk.install(patch)
            line = told(*words, "-o", "out")
        where = f"{full_at}, {disk.writes[-1]}: {line}"
        assert "No space left on device" in line and re.search("make room|the same command", line), where
        assert not list(Path().glob("out/*.part")), where
        assert run(*words, "-o", "out")[0] == 0, where
        assert rows_of("out") == reference and measured("out") == keys, where
        assert sorted(os.listdir("out")) == ["comparison.json", "comparison.md", "measurements.jsonl"], where


@pytest.mark.parametrize("task", ["perplexity on text.txt", "generating", "pruning", "reading the model", "writing"])
def test_ctrl_c_in_every_phase(run, model, task):
    options = dict(
        methods=("magnitude", "wanda"), generations=1, text="text.txt", seqlen=16, windows=4, calibration="text.txt",
        samples=4, record=False,
    )  # fmt: skip
    secateur.compare(model, **options, output="sound")
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            secateur.compare(model, **options, output=f"out{step}", progress=Interrupts(step, task))
        secateur.compare(model, **options, output=f"out{step}")
        assert rows_of(f"out{step}") == rows_of("sound") and measured(f"out{step}") == measured("sound")
        assert not {"work", "lock"} & set(os.listdir(f"out{step}"))


def test_an_interrupt_says_how_to_go_on(run, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "perplexity", interrupt)
    code, out, err = run(*ONE)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; the same command goes on where it stopped"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("name", "stride"), [("compare", 17), ("max loss", 67)])
def test_killed_anywhere_it_goes_on_to_the_same_rows(place, model, name, stride):
    """SIGKILL before the n-th change to the disk, or in the middle of it; nothing is measured twice, nothing left."""
    script = Path(__file__).with_name("dying_comparisons.py")
    command = [sys.executable, str(script), str(model), str(place), str(stride), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)[name]
    assert found["problems"] == []
    assert {"measurement", "replace", "unlink", "put"} <= set(found["points"])


def test_a_card_that_cannot_be_written_costs_no_result(run, model, place, monkeypatch):
    run("prune", "MODEL", "out", "--method", "magnitude")
    for full_at in count(1):
        disk, former = Disk(place / "out", full_at), Path("out/README.md").read_bytes()
        with monkeypatch.context() as patch:
            disk.install(patch)
            code, out, err = run("eval", "out", *ON, "--windows", full_at, "--json")
        if len(disk.writes) < full_at:
            break
        assert code == 0 and json.loads(out)["windows"] == full_at, disk.writes
        assert err.startswith("warning: out") and err.count("\n") == 1, disk.writes
        if "README" in disk.writes[-1][1] and disk.writes[-1][0] != "flush":
            assert Path("out/README.md").read_bytes() == former and not list(Path("out").glob("*.part"))
    assert any("README" in path for _, path in disk.writes)


def test_compare_refreshes_the_card_of_a_model_of_ours(run):
    run("prune", "MODEL", "out", "--method", "magnitude")
    assert "was not measured" in Path("out/README.md").read_text(encoding="utf-8")
    run("compare", "out", *ONE[2:-1])
    perplexity = rows_of("comparison")[0]["evaluation"]["perplexity"]
    assert f"{perplexity:.2f}" in Path("out/README.md").read_text(encoding="utf-8")


# What is shown.


def test_one_document_on_stdout_and_silence(run, place):
    prompt = ("--generations", 2, "--against", "MODEL")
    for words in (("eval", "MODEL", *ON, *prompt), ONE):
        code, out, err = run("-q", *words, "--json")
        assert (code, err) == (0, "") and json.loads(out)["schema"] == 1
        code, out, err = run("-q", *words)
        assert (code, err) == (0, "") and "\x1b" not in out
    code, out, err = run("-q", "report", "comparison")
    assert (code, out, err) == (0, "", "")


def shown(table, width):
    file = io.StringIO()
    Console(file=file, width=width, emoji=False).print(table)
    return file.getvalue()


def document(count=30):
    """A comparison of two models with everything that a row can hold, no two numbers alike."""
    rows = []
    for number in range(count):
        calibration = {"source": "wikitext2:train", "samples": 128, "seqlen": 2048, "seed": number}
        evaluation = {
            "perplexity": 1000.25 + number, "text": "t", "windows": 1, "seqlen": 2, "tokens": 3, "available_tokens": 4,
            "fidelity": {"kl": number / 1000, "top1": number / 1000, "blocks": []},
        }  # fmt: skip
        rows.append(
            {"model": f"somebody/a-model-{number * 2 // count}", "method": "sparsegpt:damping=0.02", "pattern": "row",
             "sparsity": number / 100, "calibration": calibration, "evaluation": evaluation,
             "perplexity_ratio": 1e7 * (number + 1), "tasks": {"mean": number / 10_000}, "bytes": 10**6 + number,
             "resident_ratio": 1 + number / 100, "decode_ratio": 2 + number / 100, "seconds": 3600.0 + number * 60,
             "peak_memory_bytes": 5 * 10**8 + number * 10**6, "error": None}
        )  # fmt: skip
    return {"rows": rows, "processor": "P", "threads": 1}


@pytest.mark.parametrize("width", [40, 80, 160, 400])
def test_no_number_is_cut_where_a_terminal_is_narrow(width):
    text = shown(comparison_table(document()), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for number in range(30):
        for cell in (
            f"{1000.25 + number:,.2f}", f"{number / 1000:.3f}", f"{number / 1000:.1%}", f"{number / 10_000:.4f}",
            f"x {1e7 * (number + 1):.1e}", f"x {2 + number / 100:.2f}", f"1 h {number} min", f"{500 + number}.0 MB",
        ):  # fmt: skip
            assert re.search(f" {re.escape(cell)} ", text), cell
    tables = text.count("┏")
    assert tables == 1 if width == 400 else tables > 1
    assert len(re.findall(r"^│ 30 ", text, re.M)) == (0 if width == 400 else tables)
    lines = [line for line in text.splitlines() if line.startswith("├")]
    assert len(lines) == tables  # between the models


HEADING = 'id="rows-heading"'
HOSTILE = "[red]:train:\x1b[31m\u202e"


def test_names_show_only_what_can_be_seen(run, model, capsys):
    shutil.copytree(model, HOSTILE)
    Path(f"{HOSTILE}.txt").write_text(TEXT * 10, encoding="utf-8")
    words = ("--text", f"{HOSTILE}.txt", "--seqlen", 16, "--windows", 4)
    for command in (
        ("eval", HOSTILE, *words, "--against", HOSTILE, "--generations", 1),
        ("compare", HOSTILE, *words, "--calibration", f"{HOSTILE}.txt", "--samples", 4, "--methods", "wanda"),
        ("prune", HOSTILE, "out", "--method", "magnitude", "--evaluate", f"{HOSTILE}.txt", "--seqlen", 16),
        ("eval", f"{HOSTILE}/none", *words),
    ):
        code, out, err = run(*command)
        assert code == (1 if "none" in command[1] else 0), err
        assert "\x1b" not in out + err and "\u202e" not in out + err
        if code == 0:
            assert "[red]:train:␛" in re.sub(r"\s", "", out)


def test_a_bar_shows_names_as_they_are(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.terminal_progress()
    bar.start("perplexity on [/red].txt", 2)
    bar.advance(note="[/blue]")
    bar.finish()
    assert "[/red].txt" in sys.stderr.getvalue()


def test_metrics_without_a_number():
    def tasks(value):
        metrics = {"word_perplexity": {"value": value, "stderr": None}}
        row = {"task": "t", "version": 1, "shots": 0, "questions": 3, "metrics": metrics}
        return {"library": "lm-eval", "results": [row], "mean": None}

    for mine, theirs, difference in ((None, 2.0, None), (2.5, None, None), (2.5, 2.0, "+0.5000")):
        found = {"tasks": tasks(mine), "against": {"model": "dense", "tasks": tasks(theirs)}}
        text = shown(evaluation_table("m", found), 160)
        assert "word_perplexity" in text and ("+" in text) == bool(difference)
        assert not difference or difference in text


def test_an_agreement_of_nothing_is_a_number():
    row = document(1)["rows"][0]
    assert "0.0%" in shown(comparison_table({"rows": [row], "processor": "P", "threads": 1}), 400)


def test_terminal_markdown_and_page_show_what_was_recorded(run):
    """All three against arithmetic of this test's own on the losses that were measured."""
    _, out, _ = run(*ONE, "--methods", "magnitude,wanda", "--sparsities", "0.5,0.7", "--format", "dense")
    run("report", "comparison")
    page = Path("report.html").read_text(encoding="utf-8")
    page = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " | ", page[page.index(HEADING) :])).replace("\u2212", "-")
    markdown = Path("comparison/comparison.md").read_text(encoding="utf-8")
    dense, *pruned = rows_of("comparison")
    assert len(pruned) == 4
    for row in pruned:
        before, after = (math.exp(r["evaluation"]["loss"]) for r in (dense, row))
        fidelity = row["evaluation"]["fidelity"]
        (line,) = [one for one in out.splitlines() if f" {row['method']} " in one and f" {row['sparsity']:.2%} " in one]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert {
            f"{after:,.2f}", f"x {after / before:.2f}", f"{fidelity['kl']:.3f}", f"{fidelity['top1']:.1%}"
        } <= set(cells)  # fmt: skip
        (line,) = [
            one
            for one in markdown.splitlines()
            if f"| `{row['method']}` |" in one and f" {row['sparsity']:.1%} " in one
        ]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        change = f"{after - before:+.2f}"
        expected = [f"{after:.2f}", change, f"{after / before:.2f}", f"{fidelity['kl']:.3g}", f"{fidelity['top1']:.1%}"]
        assert cells[3:8] == expected
        start = page.index(f"{row['method']}, {row['pattern']}, {row['target']:.0%}")
        cells = [cell.strip() for cell in page[start:].split("|") if cell.strip()]
        assert cells[1:8] == [
            f"{row['sparsity']:.2%}", f"{after:,.2f}", f"{after / before:.4g}", f"{after - before:.4g}",
            f"{row['loss_increase']:.4g}", f"{fidelity['kl']:.4g}", f"{fidelity['top1']:.2%}",
        ]  # fmt: skip
        assert row["loss_increase"] == pytest.approx(math.log(after / before))


# report.


def test_a_page_that_cannot_be_written(place, run, told):
    run("prune", "MODEL", "out", "--method", "magnitude")
    Path("pages").mkdir()
    before = everything(place)
    assert "pages: is a directory; give a file's name, such as pages/report.html" in told(
        "report", "out", "-o", "pages"
    )
    assert "a file stands where a directory is needed" in told("report", "out", "-o", "text.txt/page.html")
    for file in ("text.txt", "out/secateur.json", "out/model.safetensors"):
        assert f"{file}: is there and is no page" in told("report", "out", "-o", file)
    assert everything(place) == before
    if hasattr(os, "mkfifo"):  # stands for /dev/null, which a defect would replace
        os.mkfifo("pipe")
        assert "pipe: is there and is no page" in told("report", "out", "-o", "pipe") and Path("pipe").is_fifo()
    Path("empty.html").touch()  # as mktemp makes it
    for file in ("empty.html", "empty.html", "new/deep/page.html"):
        assert run("report", "out", "-o", file)[0] == 0
        assert Path(file).read_bytes().startswith(b"<!DOCTYPE html>")


def test_a_page_on_a_full_disk(place, run, told, monkeypatch):
    run("prune", "MODEL", "out", "--method", "magnitude")
    run("report", "out")
    before = everything(place)
    for full_at in (1, 2, 3, 4):  # made, filled, flushed, named
        with monkeypatch.context() as patch:
            Disk(place, full_at).install(patch)
            assert "report.html: cannot be written (No space left on device); make room" in told("report", "out")
        assert everything(place) == before


def test_what_is_no_record(place, told, model):
    before = everything(place)
    assert "no such file or directory" in told("report", "nowhere")
    assert "Secateur did not write it" in told("report", "MODEL")
    assert "text.txt: is damaged; it is not JSON" in told("report", "text.txt")
    assert everything(place) == before


def test_unfinished_runs_have_a_page(run, model):
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(
            model, "out", method="wanda", calibration="text.txt", samples=4, seqlen=16,
            progress=Interrupts(2 * 2 + 1),
        )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        secateur.compare(
            model, methods=("magnitude", "wanda"), text="text.txt", seqlen=16, windows=4, calibration="text.txt",
            samples=4, progress=Interrupts(2, "writing"), record=False,
        )  # fmt: skip
    for name in ("out", "out.secateur", "comparison"):
        assert run("report", name, "-o", f"{name}.html")[0] == 0


# The list.


def test_the_list_knows_every_fault_that_is_tested_here():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    mine = re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.M)
    own = {"test_the_list_knows_every_fault_that_is_tested_here"}
    assert [name for name in mine if name not in own and f"test_evidence_faults.py::{name}`" not in text] == []

"""Shrunken models in comparisons: how they are asked for, what is measured once, what their rows say."""

import doctest
import importlib
import json
import shlex

import pytest
from rich.console import Console
from typer.testing import CliRunner

import report_data
import secateur
from secateur.api import report
from secateur.cli import app
from secateur.errors import OptionError
from secateur.evaluation import subject
from secateur.evaluation.grid import Cell, Grid
from secateur.evaluation.rows import make_row
from secateur.reporting.page.plots import pictures_of
from secateur.reporting.page.rows import groups_of, setting
from secateur.reporting.terminal.evidence import comparison_table
from secateur.shrinking.request import ShrinkRequest, parse_shrink
from tiny import rows as token_rows
from tiny import save_tiny

BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # q and o, k and v, the MLP, the norms: 7744 parameters
REST = 2 * 128 * 32 + 32  # embeddings, head, norm
NEURONS = "shrink:of=neurons:round=1"
LAYERS = "shrink:of=layers:depth=influence"
CHANCE = "shrink:of=layers:depth=random"

pytestmark = pytest.mark.usefixtures("no_timing")


@pytest.fixture
def compare(model_directory, long_text, tmp_path):
    """``compare(methods=…)`` of a tiny llama of four blocks, into one directory."""

    def run(model=None, **options):
        model = model or model_directory("llama", "bfloat16", num_hidden_layers=4)
        common = {"seqlen": 16, "windows": 4, "samples": 4, "record": False, "sparsities": (0.25,)}
        return secateur.compare(
            model,
            **{**common, "calibration": long_text, "text": long_text, "output": tmp_path / "comparison", **options},
        )

    return run


@pytest.fixture
def made(monkeypatch):
    """The requests of which a model was made."""
    requests = []
    for name in ("prune_checkpoint", "shrink_checkpoint"):
        function = getattr(subject, name)

        def noting(model, output, request, *args, function=function, **options):
            requests.append(request)
            return function(model, output, request, *args, **options)

        monkeypatch.setattr(subject, name, noting)
    return requests


# Reading `shrink[:OPTION=VALUE]...`.


def test_options_of_a_request():
    text = "shrink:round=32:of=neurons+heads+neurons:compensate=no:criterion=flap:depth=influence:propagate=block"
    assert parse_shrink(text) == {
        "round": 32, "of": ["heads", "neurons"], "compensate": False, "criterion": "flap", "depth": "influence",
        "propagate": "block",
    }  # fmt: skip
    assert parse_shrink("shrink") == {} and parse_shrink("shrink:compensate=yes") == {"compensate": True}
    request = Cell(text, "structured", 0.3, "c4", 8, 3).shrink_request(
        {"seqlen": 16, "format": "nm", "propagate": "dense"}
    )
    assert request == ShrinkRequest(
        target=0.3, of=["heads", "neurons"], round=32, criterion="flap", depth="influence", compensate=False,
        propagate="block", calibration=None, samples=8, seqlen=16, seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["shrinking.request", "reporting.page.rows"])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(f"secateur.{name}"))
    assert found.attempted and not found.failed


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("shrnk", "unknown method 'shrnk': did you mean shrink"),
        ("shrinks:of=layers", "unknown method 'shrinks': did you mean shrink"),
        ("shrink:dept=kl", "cannot read option 'dept=kl' .* did you mean depth"),
        ("shrink:target=0.2", "cannot read option 'target=0.2' .* known: of, criterion, depth"),
        ("shrink:of", "cannot read option 'of'"),
        ("shrink:of=neuron", "unknown part 'neuron': did you mean neurons"),
        ("shrink:of=heads,neurons", "parts joined by \\+, such as heads\\+neurons, not 'heads,neurons'"),
        ("shrink:of=layers+heads", "of layers: stands alone"),
        ("shrink:criterion=flpa", "unknown criterion 'flpa': did you mean flap"),
        ("shrink:depth=influense", "unknown depth 'influense': did you mean influence"),
        ("shrink:compensate=maybe", "compensate takes yes or no, not 'maybe'"),
        ("shrink:round=big", "round takes int, not 'big'"),
        ("shrink:round=0", "round 0: at least 1"),
        ("shrink:propagate=blok", "unknown propagate 'blok': did you mean block"),
    ],
)
def test_a_typing_error_costs_no_hours(method, message):
    with pytest.raises(OptionError, match=message):
        cells(methods=("wanda", method))


# The grid.


def cells(common=None, **axes):
    defaults = {"sparsities": (0.2,), "patterns": ("own",), "calibrations": ("c4",), "samples": (None,), "seeds": (0,)}
    return Grid(**{"methods": ("shrink",), **defaults, **axes}).cells(**(common or {}))


def test_a_shrunken_model_crosses_with_no_pattern():
    found = cells(
        methods=("wanda", "shrink"), patterns=("own", "2:4", "block:4x4"), sparsities=(0.1, 0.2), seeds=(0, 1)
    )
    assert [(c.sparsity, c.seed) for c in found if c.method == "shrink"] == [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)]
    assert {c.pattern for c in found if c.method == "shrink"} == {"structured"}
    assert len(found) - 4 == 2 * (2 + 1 + 2)


def test_sparsities_beside_patterns_that_have_their_own_are_for_shrinking():
    found = cells(methods=("wanda", "shrink"), patterns=("2:4",), sparsities=(0.1, 0.3))
    assert [(c.method, c.sparsity) for c in found] == [("wanda", 0.5), ("shrink", 0.1), ("shrink", 0.3)]
    with pytest.raises(OptionError, match=r"sparsities 0.1: each of the patterns 2:4 has its own"):
        cells(methods=("wanda",), patterns=("2:4",), sparsities=(0.1,))


@pytest.mark.parametrize(
    ("method", "calibrated", "seeds"),
    [
        ("shrink", True, 2),
        ("shrink:criterion=magnitude:compensate=no", True, 2),  # the split between heads and neurons is tried out
        ("shrink:of=neurons:criterion=magnitude:compensate=no", False, 1),
        ("shrink:of=neurons:criterion=magnitude:compensate=no:depth=random", False, 1),  # no blocks are chosen
        ("shrink:of=neurons:criterion=magnitude", True, 2),
        ("shrink:of=neurons:criterion=random:compensate=no", False, 2),
        ("shrink:of=heads:criterion=random", True, 2),
        (LAYERS, True, 2),
        (CHANCE, False, 2),
    ],
)
def test_a_cell_has_no_text_and_no_seed_that_change_nothing(method, calibrated, seeds):
    found = cells(methods=(method,), seeds=(0, 1), calibrations=("c4", "sotu"), samples=(8, 16))
    assert len(found) == (8 if calibrated else seeds)
    assert {c.calibration for c in found} == ({"c4", "sotu"} if calibrated else {None})
    assert {c.samples for c in found} == ({8, 16} if calibrated else {None})
    assert {c.seed for c in found} == ({0, 1} if seeds == 2 else {None})


@pytest.mark.parametrize(
    ("axes", "common", "message"),
    [
        ({"sparsities": (1.0,)}, {}, "target 1: a fraction that goes"),
        ({"samples": (0,)}, {}, "samples 0"),
        ({}, {"dtype": "int3"}, "int3"),
        ({"methods": ("wanda", "shrink")}, {"include": ["mlp"]}, "include and method 'shrink'"),
        ({"methods": ("wanda", "shrink")}, {"exclude": ["mlp"]}, "exclude and method 'shrink'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_opened(axes, common, message):
    with pytest.raises(OptionError, match=message):
        cells(common, **axes)


# Rows.


def test_a_shrunken_row_is_stored_dense_and_a_pruned_one_as_asked():
    pruned, shrunken = Cell("wanda", "row", 0.5, "c4", None, 0), Cell("shrink", "structured", 0.5, "c4", None, 0)
    assert [make_row("m", cell, "bitmask", 1, {}, None)["format"] for cell in (None, pruned, shrunken)] == [
        "dense", "bitmask", "dense",
    ]  # fmt: skip


def test_rows_are_what_shrink_and_evaluate_give_one_by_one(compare, model_directory, long_text, tmp_path):
    dense = model_directory("llama", "bfloat16", num_hidden_layers=4)
    found = compare(methods=("magnitude", NEURONS, LAYERS, CHANCE))
    _, pruned, neurons, layers, chance = found["rows"]
    assert [row["error"] for row in found["rows"]] == [None] * 5
    assert [row["format"] for row in found["rows"]] == ["dense", "bitmask", "dense", "dense", "dense"]
    # A quarter of the blocks' parameters are 20.17 neurons of 3 x 32 parameters in each block: 20 of them go.
    assert neurons["sparsity"] == pytest.approx(20 * 96 / BLOCK, abs=1e-12)
    assert layers["sparsity"] == chance["sparsity"] == 0.25
    whole = 2 * (REST + 4 * BLOCK)  # bytes
    assert (neurons["bytes"], layers["bytes"]) == (whole - 2 * 4 * 20 * 96, whole - 2 * BLOCK)
    assert layers["bytes_ratio"] == pytest.approx((whole - 2 * BLOCK) / whole)
    assert chance["calibration"] is None and chance["seed"] == 0 and pruned["seed"] is None
    for number, row in enumerate((neurons, layers, chance)):
        asked = ShrinkRequest(**parse_shrink(row["method"]))
        shrunken = secateur.shrink(
            dense, tmp_path / str(number), target=0.25, of=asked.parts, depth=asked.depth, round=asked.round,
            calibration=long_text, samples=4, seqlen=16,
        )  # fmt: skip
        alone = secateur.evaluate(tmp_path / str(number), text=long_text, seqlen=16, windows=4, against=dense)
        assert row["evaluation"] == {key: alone[key] for key in row["evaluation"]}
        assert row["perplexity_ratio"] == pytest.approx(alone["perplexity"] / alone["against"]["perplexity"])
        assert row["bytes"] == shrunken["bytes"]["output"]
        assert row["calibration"] == shrunken["plan"]["calibration"]
        assert (row["pattern"], row["target"]) == ("structured", 0.25) and row["seconds"] > 0
        assert row["peak_memory_bytes"] > 1e6


# What is measured once.


def test_the_same_again_makes_nothing_however_it_is_said(compare, made):
    first = compare(methods=(NEURONS, CHANCE))["rows"]
    assert len(made) == 2
    again = compare(
        methods=("shrink:round=1:of=neurons:criterion=obs:compensate=yes", CHANCE), format="dense", propagate="dense"
    )["rows"]
    assert len(made) == 2
    assert again[1] == {**first[1], "method": again[1]["method"]} and again[2] == first[2]


def test_what_changes_nothing_makes_nothing(compare, made, tmp_path):
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in token_rows(4, 16)))
    compare(methods=("shrink:round=1",), calibration=str(ids), seeds=(0, 1))  # the same rows, whatever the seed
    compare(methods=("shrink:of=neurons+heads:round=1", "shrink:round=1"), calibration=str(ids))
    assert len(made) == 1


def test_what_decides_the_result_is_measured_anew(compare, made):
    compare(methods=(NEURONS,))
    others = ("criterion=flap", "compensate=no", "propagate=block", "round=2")
    compare(methods=tuple(f"shrink:of=neurons:round=1:{other}" for other in others))
    assert len(made) == 1 + 4
    compare(methods=(NEURONS,), sparsities=(0.2,))
    compare(methods=(NEURONS,), seeds=(1,))  # other crops
    compare(methods=(NEURONS,), dtype="float32")
    assert len(made) == 5 + 3


def test_chance_is_drawn_once_for_each_seed(compare, made):
    rows = compare(methods=(CHANCE,), seeds=(0, 1, 2), sparsities=(0.5,))["rows"]
    assert [request.seed for request in made] == [0, 1, 2]
    assert len({row["evaluation"]["loss"] for row in rows}) > 2
    compare(methods=(CHANCE,), seeds=(2, 0), sparsities=(0.5,), calibration="c4")  # which is not read
    assert len(made) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stopped_comparison_goes_on(compare, monkeypatch, messages, tmp_path, threads):
    function, count = subject.perplexity, 0

    def interrupted(*args, **options):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(subject, "perplexity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(methods=(LAYERS,), threads=1)
    rows = compare(methods=(LAYERS,), threads=threads)["rows"]
    taken_up = any("holds the finished result" in message for message in messages)
    assert taken_up is (threads == 1)  # with other threads it is made anew
    whole = compare(methods=(LAYERS,), output=tmp_path / "whole", threads=threads)["rows"]
    assert rows[1]["error"] is None and rows[1]["evaluation"] == whole[1]["evaluation"]
    assert not (tmp_path / "comparison" / "work").exists()


def test_one_failing_cell_is_reported_and_the_rest_goes_on(compare, tokenizer, tmp_path, caplog):
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2", tokenizer=tokenizer)
    found = compare(gpt2, methods=("shrink:of=heads", "magnitude", NEURONS))
    assert [bool(row["error"]) for row in found["rows"]] == [False, True, False, False]
    failed = found["rows"][1]
    assert "head" in failed["error"] and failed["error"] in caplog.text
    assert (failed["format"], failed["target"], failed["sparsity"], failed["bytes"]) == ("dense", 0.25, None, None)
    assert found["rows"][3]["sparsity"] == pytest.approx(0.25, abs=0.01)
    markdown = (tmp_path / "comparison" / "comparison.md").read_text()
    assert "- Failed: `shrink:of=heads`, `structured`, (25.0%): " in markdown


# What is shown.


def test_the_command_makes_the_same_rows(compare, made):
    methods = ("wanda", "shrink:of=heads+neurons:round=1:compensate=no", CHANCE)
    found = compare(methods=methods, sparsities=(0.25, 0.5))
    assert f"--methods {','.join(methods)} --sparsities 0.25,0.5" in found["command"]
    count = len(made)
    result = CliRunner().invoke(app, [*shlex.split(found["command"])[1:], "--json"])
    assert result.exit_code == 0, result.output
    again = json.loads(result.stdout)
    assert again["rows"] == json.loads(json.dumps(found["rows"])) and again["command"] == found["command"]
    assert len(made) == count == 6


def test_tables_say_what_the_sparsity_of_shrunken_models_is(compare, tmp_path):
    note = "Sparsity of shrunken models"
    found = compare(methods=("magnitude", LAYERS, CHANCE), seeds=(0, 5))
    console = Console(width=300)
    with console.capture() as capture:
        console.print(comparison_table(found))
    table = capture.get()
    lines = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "shrink:" in line]
    assert [line[1:5] for line in lines if CHANCE in line] == [
        [CHANCE, "structured", "25.00%", "seed 0"], [CHANCE, "structured", "25.00%", "seed 5"],
    ]  # fmt: skip
    assert f"{LAYERS}" in table and note in table
    markdown = (tmp_path / "comparison" / "comparison.md").read_text()
    assert f"| `{CHANCE}` | `structured` | 5 | 25.0% |" in markdown and f"- {note}" in markdown
    page = report(tmp_path / "comparison", output=tmp_path / "report.html")
    assert note in page.read_text()
    compare(methods=("magnitude",))
    assert note not in (tmp_path / "comparison" / "comparison.md").read_text()


def test_each_way_of_shrinking_is_a_line_of_its_own():
    long = [
        f"shrink:of=heads+neurons:criterion=wanda-sp:round={width}:propagate=block:compensate=no:depth=influence"
        for width in (32, 48)
    ]
    shrunken = [report_data.row(method, "structured", 0.1, 11.0) for method in (*long, LAYERS, NEURONS)]
    assert setting(shrunken[0]) == setting(shrunken[1])  # for want of room
    rows = [report_data.row("dense", None, 0.0, 5.0), report_data.row("wanda", "row", 0.1, 10.0)]
    picture = pictures_of(groups_of([*rows, *shrunken]))[0]
    assert picture.id == "by-sparsity" and " of 5 series" in picture.says
    drawn = str(picture.svg)
    assert "shrink layers influence" in drawn and "shrink neurons round=1" in drawn
    assert "Sparsity, zeros / weights, or parameters removed" in drawn
    assert [row[0].text for row in picture.table.rows[-2:]] == [f"{LAYERS}, 10%", f"{NEURONS}, 10%"]
    assert "parameters removed" not in str(pictures_of(groups_of(rows))[0].svg)

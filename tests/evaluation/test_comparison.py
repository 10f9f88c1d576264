"""Comparisons: their arithmetic by hand, what is measured once, and what goes on after a stop."""

import json
import math

import pytest

import secateur
from secateur.errors import DataError, ModelError, OptionError, OutputError
from secateur.evaluation import subject
from secateur.evaluation.grid import Cell, Grid
from secateur.evaluation.rows import make_row

COMMON = {"seqlen": 16, "windows": 4, "samples": 4, "record": False}


pytestmark = pytest.mark.usefixtures("no_timing")


@pytest.fixture
def text(long_text):
    return long_text


@pytest.fixture
def compare(model_directory, text, tmp_path):
    """``compare(methods=…)`` of the tiny llama, into one directory."""

    def run(models=None, **options):
        models = models or model_directory("llama", "bfloat16")
        chosen = {"calibration": text, "text": text, "output": tmp_path / "comparison", **COMMON, **options}
        return secateur.compare(models, **chosen)

    run.folder = tmp_path / "comparison"
    return run


@pytest.fixture
def calls(monkeypatch):
    """How often the work of a comparison was done."""
    counted = {"prune_checkpoint": 0, "perplexity": 0, "tokens_for": 0, "measure_speed": 0}

    def counting(name):
        function = getattr(subject, name)

        def counted_call(*args, **options):
            counted[name] += 1
            return function(*args, **options)

        return counted_call

    for name in counted:
        monkeypatch.setattr(subject, name, counting(name))
    return counted


# The grid.


def cells(**axes):
    defaults = {"sparsities": (0.5,), "patterns": ("own",), "calibrations": ("c4",), "samples": (None,), "seeds": (0,)}
    return Grid(**{"methods": ("wanda",), **defaults, **axes}).cells()


def test_sparsities_cross_with_patterns_that_have_none_of_their_own():
    found = cells(methods=("magnitude", "wanda"), sparsities=(0.5, 0.6), patterns=("own", "2:4", "4:16"))
    assert [(c.method, c.pattern, c.sparsity) for c in found] == [
        ("magnitude", "matrix", 0.5), ("magnitude", "matrix", 0.6), ("magnitude", "2:4", 0.5),
        ("magnitude", "4:16", 0.75),
        ("wanda", "row", 0.5), ("wanda", "row", 0.6), ("wanda", "2:4", 0.5), ("wanda", "4:16", 0.75),
    ]  # fmt: skip


def test_a_method_without_calibration_is_one_cell_and_no_cell_comes_twice():
    found = cells(methods=("magnitude", "wanda"), seeds=(0, 1), samples=(8, 16), patterns=("own", "row"))
    assert sum(c.method == "magnitude" for c in found) == 2  # matrix, row
    assert sum(c.method == "wanda" for c in found) == 4  # its own is row
    assert Cell("magnitude", "matrix", 0.5, None, None, None) in found


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"methods": ("wnada",)}, "did you mean wanda"),
        ({"methods": ()}, "methods: give at least one"),
        ({"patterns": ("own", "")}, "patterns: give at least one"),
        ({"patterns": ("5:4",)}, "5:4"),
        ({"sparsities": (1.5,)}, "1.5"),
        ({"methods": ("wanda:power=2",)}, "power"),
        ({"samples": (0,)}, "samples 0"),
    ],
)
def test_a_typing_error_costs_no_hours(axes, message):
    with pytest.raises(OptionError, match=message):
        cells(**axes)


# The arithmetic.


def test_a_row_against_its_dense_row():
    dense = make_row(
        "m", None, "bitmask", 1000,
        {"evaluation": {"loss": math.log(20), "perplexity": 20.0}, "tasks": {"mean": 0.5}, "bench": {"models": [{}]}},
        None,
    )  # fmt: skip
    assert dense["format"] == "dense"
    assert (dense["method"], dense["sparsity"], dense["bytes"], dense["bytes_ratio"]) == ("dense", 0.0, 1000, 1.0)
    assert dense["perplexity_ratio"] is dense["decode_ratio"] is dense["task_mean_change"] is None

    def model(memory, *speeds):
        return {"resident_bytes": memory, "speeds": [{"decode": {"median": speed}} for speed in speeds]}

    results = {
        "evaluation": {"loss": math.log(30), "perplexity": 30.0, "fidelity": {"kl": 0.4, "top1": 0.8, "blocks": []}},
        "tasks": {"mean": 0.45},
        "bench": {"models": [model(300, 50.0, 90.0), model(400, 40.0, 99.0)]},
        "pruned": {
            "sparsity": 0.499, "seconds": 12.0, "peak_memory_bytes": 7, "bytes": {"output": 650},
            "calibration": {"seed": 3},
        },
        "generations": [{"prompt": "a"}],
    }  # fmt: skip
    row = make_row("m", Cell("wanda", "row", 0.5, "c4", None, 3), "bitmask", 1000, results, dense)
    assert row["loss_increase"] == pytest.approx(math.log(1.5))
    assert (row["perplexity_increase"], row["perplexity_ratio"]) == (10.0, 1.5)
    assert row["task_mean_change"] == pytest.approx(-0.05)
    assert (row["bytes"], row["bytes_ratio"]) == (650, 0.65)
    assert (row["decode_ratio"], row["resident_ratio"]) == (1.25, 0.75)  # of the smallest batch
    assert (row["sparsity"], row["target"], row["seconds"], row["seed"]) == (0.499, 0.5, 12.0, 3)
    assert row["format"] == "bitmask"
    assert row["generations"] == [{"prompt": "a"}] and row["error"] is None
    cell = Cell("wanda", "row", 0.5, "c4", None, 3)
    failed = make_row("m", cell, "bitmask", 1000, {"pruned": results["pruned"]}, dense, RuntimeError("oh\nno"))
    assert failed["error"] == "RuntimeError: oh" and set(failed) == set(row) - {"generations"}
    assert (failed["bytes_ratio"], failed["seconds"]) == (0.65, 12.0) and failed["perplexity_ratio"] is None
    never = make_row("m", cell, "bitmask", None, {}, None, DataError("no text"))
    assert never["error"] == "no text" and never["sparsity"] is never["bytes"] is never["bytes_ratio"] is None
    lost = {**results, "evaluation": {"loss": 800.0, "perplexity": None}, "tasks": {"mean": None}}
    row = make_row("m", Cell("wanda", "row", 0.5, "c4", None, 3), "bitmask", 1000, lost, dense)
    assert row["perplexity_ratio"] is row["perplexity_increase"] is row["task_mean_change"] is None
    assert row["loss_increase"] == pytest.approx(800 - math.log(20))


# Whole comparisons.


def test_rows_are_what_prune_and_evaluate_give_one_by_one(compare, model_directory, text, tmp_path):
    dense = model_directory("llama", "bfloat16")
    found = compare(methods=("magnitude", "wanda"), patterns=("own", "2:4"), sparsities=(0.3,))
    assert [(row["method"], row["pattern"]) for row in found["rows"]] == [
        ("dense", None), ("magnitude", "matrix"), ("magnitude", "2:4"), ("wanda", "row"), ("wanda", "2:4"),
    ]  # fmt: skip
    measure = {"text": text, "seqlen": 16, "windows": 4}
    assert found["rows"][0]["evaluation"] == secateur.evaluate(dense, **measure)
    for row in found["rows"][1:]:
        out = tmp_path / f"{row['method']}-{row['pattern'].replace(':', 'of')}"
        report = secateur.prune(
            dense, out, method=row["method"], pattern=row["pattern"], sparsity=row["target"], calibration=text,
            samples=4, seqlen=16, format="bitmask",
        ).report  # fmt: skip
        alone = secateur.evaluate(out, **measure, against=dense)
        assert {**row["evaluation"]} == {key: alone[key] for key in row["evaluation"]}
        assert row["evaluation"]["fidelity"] == alone["fidelity"]
        assert row["sparsity"] == report["sparsity"] and row["bytes"] == report["bytes"]["output"]
        assert row["calibration"] == report["plan"]["calibration"]
        assert row["seconds"] > 0 and row["peak_memory_bytes"] > 1e6
    folder = tmp_path / "comparison"
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(found))
    assert "| `wanda` |" in (folder / "comparison.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "comparison.md", "measurements.jsonl"]


def test_the_same_again_measures_nothing_and_more_measures_what_is_new(compare, calls):
    first = compare(methods=("magnitude", "wanda"))
    assert calls["prune_checkpoint"] == 2 and calls["perplexity"] == 3
    assert compare(methods=("magnitude", "wanda"))["rows"] == first["rows"]
    assert calls["prune_checkpoint"] == 2 and calls["perplexity"] == 3
    more = compare(methods=("magnitude", "wanda", "ria"), seeds=(0, 1))
    assert calls["prune_checkpoint"] == 2 + 3  # ria twice, wanda with the other seed
    assert calls["perplexity"] == 3 + 1 + 3  # the dense model's predictions anew, its figures are known
    assert [row for row in more["rows"] if row in first["rows"]] == first["rows"]
    compare(methods=("magnitude",), generations=1)
    assert calls["prune_checkpoint"] == 5 + 1 and calls["perplexity"] == 7  # only the texts were missing


def test_what_can_be_shared_is_computed_once(compare, calls):
    compare(methods=("wanda", "ria", "sparsegpt"), sparsities=(0.3, 0.5))
    assert calls["tokens_for"] == 1
    assert calls["perplexity"] == 7 and calls["prune_checkpoint"] == 6


@pytest.mark.parametrize("stop", ["prune_checkpoint", "perplexity"])
def test_a_stopped_comparison_goes_on(compare, calls, monkeypatch, stop, tmp_path):
    whole = compare(methods=("magnitude", "wanda", "ria"), output=tmp_path / "whole")["rows"]
    before = dict(calls)
    function, count = getattr(subject, stop), 0

    def interrupted(*args, **options):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(subject, stop, interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(methods=("magnitude", "wanda", "ria"))
    partial = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["rows"]
    assert 1 < len(partial) < len(whole)
    rows = compare(methods=("magnitude", "wanda", "ria"))["rows"]
    own = {"seconds", "peak_memory_bytes"}
    assert [{k: v for k, v in row.items() if k not in own} for row in rows] == [
        {k: v for k, v in row.items() if k not in own} for row in whole
    ]
    assert rows[: len(partial)] == partial
    made = calls["prune_checkpoint"] - before["prune_checkpoint"]
    assert made == (3 if stop == "prune_checkpoint" else 4)  # one that was made and not measured is taken up


def test_what_was_stopped_goes_on_with_other_threads(compare, monkeypatch):
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
            compare(methods=("wanda",), threads=1)
    assert "Unfinished: 1 of 2 rows" in (compare.folder / "comparison.md").read_text()
    found = compare(methods=("wanda",), threads=2)
    assert [row["error"] for row in found["rows"]] == [None, None] and found["planned"] == 2
    assert "Unfinished" not in (compare.folder / "comparison.md").read_text()


def test_one_failing_cell_is_reported_and_the_rest_goes_on(compare, tmp_path, caplog):
    found = compare(methods=("magnitude", "wanda"), calibration=str(tmp_path / "missing.txt"))
    assert [bool(row["error"]) for row in found["rows"]] == [False, False, True]
    assert "missing.txt" in found["rows"][2]["error"] and "missing.txt" in caplog.text
    assert found["rows"][2]["evaluation"] is None and found["rows"][1]["perplexity_ratio"] > 0
    with pytest.raises(DataError, match=r"missing\.txt"):
        compare(methods=("wanda",), calibration=str(tmp_path / "missing.txt"))


def test_nothing_is_compared_with_a_dense_model_that_did_not_come_to_the_end(compare, monkeypatch):
    function, failed = subject.perplexity, []

    def fails_once(reading, progress, **options):
        if not failed:
            failed.append(True)
            raise MemoryError
        return function(reading, progress, **options)

    with monkeypatch.context() as patch:
        patch.setattr(subject, "perplexity", fails_once)
        found = compare(methods=("magnitude",))
    assert found["rows"][0]["error"] == "MemoryError: " and found["rows"][1]["error"] is None
    again = compare(methods=("magnitude",))["rows"][1]
    assert (
        again["evaluation"]
        == compare(methods=("magnitude",), output=compare.folder.with_name("anew"))["rows"][1]["evaluation"]
    )


def test_a_failed_cell_is_tried_again(compare, monkeypatch):
    def fails(*args, **options):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(subject, "prune_checkpoint", fails)
        with pytest.raises(MemoryError):
            compare(methods=("magnitude",))
    assert compare(methods=("magnitude",))["rows"][1]["error"] is None


def test_several_models_and_one_that_cannot_be_opened(compare, model_directory, tmp_path):
    models = [model_directory("llama", "bfloat16"), tmp_path / "nothing", model_directory("llama", "float32")]
    found = compare(models, methods=("magnitude",))
    assert [(row["model"], row["method"]) for row in found["rows"]] == [
        (str(models[0]), "dense"), (str(models[0]), "magnitude"), (str(models[1]), "dense"),
        (str(models[2]), "dense"), (str(models[2]), "magnitude"),
    ]  # fmt: skip
    assert found["rows"][2]["error"] and not found["rows"][4]["error"]
    with pytest.raises(ModelError, match="nothing"):
        compare([tmp_path / "nothing"], methods=("magnitude",), output=tmp_path / "other")


def test_memory_and_speed_are_measured_in_turn_with_the_dense_model(compare, calls, model_directory):
    long = model_directory("llama", max_position_embeddings=256)
    found = compare(long, methods=("magnitude",), bench=True)
    assert found["rows"][1]["error"] is None, found["rows"][1]["error"]
    assert len(found["rows"][0]["bench"]["models"]) == 1 and len(found["rows"][1]["bench"]["models"]) == 2
    speeds = [model["speeds"][0]["decode"]["median"] for model in found["rows"][1]["bench"]["models"]]
    assert found["rows"][1]["decode_ratio"] == pytest.approx(speeds[0] / speeds[1])
    compare(long, methods=("magnitude",), bench=True)
    assert calls["measure_speed"] == 2


def test_what_was_measured_before_a_failure_stays(compare):
    with pytest.raises(OptionError, match="context has 64"):
        compare(methods=("magnitude",), bench=True)
    rows = json.loads((compare.folder / "comparison.json").read_text())["rows"]
    assert all("context has 64" in row["error"] and row["evaluation"]["perplexity"] for row in rows)
    assert rows[1]["perplexity_ratio"] and rows[1]["bytes_ratio"] < 1


def test_another_process_at_work(compare, tmp_path):
    from filelock import FileLock

    (tmp_path / "comparison").mkdir()
    with FileLock(tmp_path / "comparison" / "lock"), pytest.raises(OutputError, match="another process measures there"):
        compare(methods=("magnitude",))


def test_torn_and_damaged_journals(compare, tmp_path, calls):
    compare(methods=("magnitude",))
    journal = tmp_path / "comparison" / "measurements.jsonl"
    whole = journal.read_text()
    journal.write_text(whole + '{"cell": {"mod')
    compare(methods=("magnitude",))
    assert calls["prune_checkpoint"] == 1 and journal.read_text() == whole
    journal.write_text("nonsense\n" + whole)
    with pytest.raises(OutputError, match=r"measurements.jsonl: line 1 is damaged"):
        compare(methods=("magnitude",))


def test_the_command_that_asks_the_same(compare, model_directory, text, tmp_path):
    name = model_directory("llama", "bfloat16")
    command = compare(methods=("magnitude",), sparsities=(0.5, 0.6))["command"]
    assert command == (
        f"secateur compare {name} --methods magnitude --sparsities 0.5,0.6 --calibration {text} --samples 4 "
        f"--seqlen 16 --text {text} --windows 4 --output {tmp_path / 'comparison'} --no-record"
    )


def test_a_dense_model_that_secateur_wrote_notes_its_evaluation(compare, model_directory, tmp_path):
    ours = tmp_path / "ours"
    secateur.prune(model_directory("llama", "bfloat16"), ours, method="magnitude", sparsity=0.2)
    rows = compare(ours, methods=("magnitude",), record=True)["rows"]
    line = json.loads((ours / "evaluations.jsonl").read_text())
    assert line["perplexity"] == rows[0]["evaluation"]["perplexity"]

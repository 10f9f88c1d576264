"""What lies on disk becomes records, or an error of one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from report_data import Json, a_course, a_training, packed_report, save_output, save_run
from secateur.errors import DataError, OutputError
from secateur.evaluation.records import EVALUATIONS as WRITTEN_EVALUATIONS
from secateur.pipeline.run_directory import REPORT as WRITTEN_REPORT
from secateur.reporting.page.records import EVALUATIONS, REPORT, load_records


def test_the_files_are_those_that_are_written() -> None:
    assert (REPORT, EVALUATIONS) == (WRITTEN_REPORT, WRITTEN_EVALUATIONS)


def test_every_kind_is_known_by_what_it_holds(every_kind: dict[str, Path]) -> None:
    kinds = {name: load_records(path).kind for name, path in every_kind.items()}
    models = {"pruned": "pruned", "full": "pruned", "hostile": "pruned", "packed": "packed", "packed int8": "packed"}
    models |= {"trained": "trained", "trained hostile": "trained", "trained packed": "packed"}
    models |= {"shrunk": "shrunk", "shrunk hostile": "shrunk", "shrunk packed": "packed"}
    unfinished = dict.fromkeys(("unfinished", "shrunk unfinished", "trained unfinished"), "unfinished")
    assert kinds == {**dict.fromkeys(kinds, "comparison"), **models, **unfinished}


def test_an_output_is_read_with_its_evaluations(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    records = load_records(save_output(tmp_path / "out", pruned, lines))
    assert (records.name, records.report, list(records.evaluations)) == ("out", pruned, lines)


def test_a_torn_last_line_is_left_out(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    out = save_output(tmp_path / "out", pruned, lines)
    with (out / EVALUATIONS).open("a") as file:
        file.write('{"schema": 1, "da')
    assert list(load_records(out).evaluations) == lines


def test_a_run_is_read_from_plan_and_journal_in_the_form_of_a_report(tmp_path: Path, pruned: Json) -> None:
    run = save_run(tmp_path / "out.secateur", pruned, 1)
    (run / "source-1").mkdir()
    (run / "source-1/config.json").write_text('{"num_hidden_layers": 2}')
    for path in (run, tmp_path / "out"):  # the OUTPUT that it is to make, too
        records = load_records(path)
        assert (records.kind, records.name, records.blocks) == ("unfinished", "out", 2)
        assert records.report["plan"] == pruned["plan"]
        assert records.report["matrices"] == pruned["matrices"][:3]
        assert [block["seconds"] for block in records.report["blocks"]] == [1.5]
        assert records.report["evaluation"] == {"before": pruned["evaluation"]["before"], "after": None}


def test_how_many_blocks_a_run_has_may_be_unknown(tmp_path: Path, pruned: Json) -> None:
    assert load_records(save_run(tmp_path / "out.secateur", pruned, 1)).blocks is None


def test_an_unfinished_packing_is_read_too(tmp_path: Path) -> None:
    run = tmp_path / "out.secateur"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps(packed_report(None)["plan"]))
    (run / "journal.jsonl").write_text('{"block": 0, "dense": []}\n')
    assert len(load_records(run).report["blocks"]) == 1


@pytest.mark.parametrize("form", ["one after the other", "list", "directory"])
def test_a_comparison_may_be_several_documents(tmp_path: Path, comparison: Json, form: str) -> None:
    text, path = json.dumps(comparison, indent=1), tmp_path / "all.json"
    if form == "directory":
        (tmp_path / "table").mkdir()
        path = tmp_path / "table" / "comparison.json"
    path.write_text(f"[{text},{text}]" if form == "list" else f"{text}\n{text}\n")
    records = load_records(path.parent if form == "directory" else path)
    assert list(records.comparisons) == [comparison, comparison]
    assert records.name == ("table" if form == "directory" else "all")


def test_what_is_not_finite_counts_as_not_measured(tmp_path: Path, comparison: Json) -> None:
    comparison["rows"][1]["evaluation"]["perplexity"] = float("inf")
    comparison["rows"][2]["loss_increase"] = float("nan")
    (tmp_path / "c.json").write_text(json.dumps(comparison).replace('"seconds": 3.0', '"seconds": 1e999'))
    rows = load_records(tmp_path / "c.json").comparisons[0]["rows"]
    assert rows[1]["evaluation"]["perplexity"] is rows[2]["loss_increase"] is rows[0]["seconds"] is None


def refused(path: Path, error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        load_records(path)
    message = str(caught.value)
    assert type(caught.value) is error and "\n" not in message and all(word in message for word in words), message


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, OutputError, "Secateur did not write it")
    refused(tmp_path / "nothing", OutputError, "no such file")
    (tmp_path / "config.json").write_text('{"rows": 3}')
    refused(tmp_path / "config.json", OutputError, "is no comparison")
    (tmp_path / "empty.json").write_text(" \n")
    refused(tmp_path / "empty.json", OutputError, "is no comparison")


@pytest.mark.parametrize("text", ["{", "[1]", '"a"', "[" * 100_000, '{"schema": ' + "9" * 5000 + "}", "\xff"])
def test_damage_is_named_by_its_file(
    tmp_path: Path, pruned: Json, comparison: Json, lines: list[Json], text: str
) -> None:
    out = save_output(tmp_path / "out", pruned, lines)
    path = out / EVALUATIONS
    path.write_bytes(path.read_bytes() + text.encode("latin-1") + b"\n" + json.dumps(lines[0]).encode() + b"\n")
    refused(out, DataError, "evaluations.jsonl: line 3", "damaged")
    (out / REPORT).write_bytes(text.encode("latin-1"))
    refused(out, DataError, "secateur.json", "damaged")
    run = save_run(tmp_path / "run.secateur", pruned, 1)
    (run / "journal.jsonl").write_bytes(text.encode("latin-1") + b"\n")
    refused(run, DataError, "journal.jsonl: line 1", "damaged")
    file = tmp_path / "c.json"
    file.write_bytes(json.dumps(comparison).encode() + text.encode("latin-1"))
    refused(file, DataError if text not in ("[1]", '"a"') else OutputError, "c.json")


def test_an_unknown_schema_is_refused(tmp_path: Path, pruned: Json, lines: list[Json], comparison: Json) -> None:
    refused(save_output(tmp_path / "a", {**pruned, "schema": 2}), DataError, "schema 2", "secateur.json")
    refused(save_output(tmp_path / "b", pruned, [{**lines[0], "schema": 9}]), DataError, "schema 9", "line 1")
    (tmp_path / "c.json").write_text(json.dumps([comparison, {**comparison, "schema": None}]))
    refused(tmp_path / "c.json", DataError, "schema None")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("preset", ["best"]),
        ("reconstruct", True),
        ("reconstruct", {"epochs": 8}),
        ("allocation_found", {"name": "linear"}),
        ("allocation_found", {"name": "linear", "mean": 0.5, "slopes": [{"slope": 0.1}]}),
        ("allocation_found", {"name": "linear", "mean": 0.5, "slope": 0.1, "slopes": [{"kl": 0.1}]}),
    ],
)
def test_a_malformed_entry_of_a_plan_is_refused(tmp_path: Path, refined: Json, key: str, wrong: Any) -> None:
    refined["plan"][key] = wrong
    refused(save_output(tmp_path / "out", refined), DataError, f"plan: {key}")
    refused(save_run(tmp_path / "run.secateur", refined, 1), DataError, f"plan.json: {key}")


def test_a_malformed_reconstruction_of_a_block_is_refused(tmp_path: Path, refined: Json) -> None:
    refined["blocks"][1]["reconstruction"]["error_after"] = "small"
    refused(save_output(tmp_path / "out", refined), DataError, "blocks[1]: reconstruction: error_after")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in inner for found in places(item, (*path, key))]


@pytest.mark.parametrize("wrong", ["text", 7, "absent"])
def test_any_value_of_another_type_makes_a_page_or_an_error_of_one_line(
    tmp_path: Path,
    pruned: Json,
    refined: Json,
    shrunk: Json,
    lines: list[Json],
    wrong: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from secateur.reporting.page import charts, render

    monkeypatch.setattr(charts, "draw", lambda *_, **__: "")  # slow, and of no account here
    out = save_output(tmp_path / "out", refined, lines)
    course = a_training()
    course["plan"] |= {"course": a_course(), "teacher": {"name": "t", "digest": "d"}}
    sound = [
        (REPORT, refined),
        (EVALUATIONS, lines[0]),
        (REPORT, shrunk),
        (REPORT, a_training(pruned)),
        (REPORT, course),
    ]
    outcomes = set()
    for file, document in sound:
        for *way, last in places(document):
            damaged = json.loads(json.dumps(document))
            parent = damaged
            for key in way:
                parent = parent[key]
            if wrong == "absent" and isinstance(parent, dict):
                del parent[last]
            else:
                parent[last] = wrong
            (out / file).write_text(json.dumps(damaged) + "\n")
            try:
                render.render_page(load_records(out))
                outcomes.add("page")
            except DataError as error:
                outcomes.add(f"error of {len(str(error).splitlines())} line")
        (out / file).write_text(json.dumps(document) + "\n")
    assert outcomes == {"page", "error of 1 line"}

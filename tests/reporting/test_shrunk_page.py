"""The page of a shrunk model: what went, what was tried, and what it cost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from html_pages import Node, Tree, cards, page_of, table
from report_data import Json, packed_report, save_output, save_run
from secateur.api import report, shrink
from secateur.errors import DataError
from secateur.reporting.page.records import load_records
from secateur.reporting.page.render import render_page
from tiny import rows


def page(tmp_path: Path, document: Json, lines: list[Json] = []) -> Node:  # noqa: B006  never changed
    return page_of(load_records(save_output(tmp_path / "out", document, lines)))


def titles(page: Node) -> list[str]:
    return [svg.all("title")[0].words for svg in page.all("svg")]


def test_what_went_what_it_cost_and_what_it_gained(tmp_path: Path, shrunk: Json, lines: list[Json]) -> None:
    found = page(tmp_path, shrunk, lines)
    assert found.all("h1")[0].words == "tiny, 25.0% of its blocks' parameters removed"
    lead = next(p.words for p in found.all("p") if p.attributes.get("class") == "lead")
    assert lead == (
        "Of 1,600 parameters of its blocks 25.00% were removed; 1,200 are left. It has 1,152 neurons in each MLP "
        "instead of 1,536 and 3 blocks instead of 4. obs chose what went; each matrix after a cut was solved anew by "
        "least squares. Perplexity went from 20.00 to 50.00 on wiki. The checkpoint takes 6.4 kB."
    )
    shown = cards(found)
    assert shown["Perplexity"].startswith("20.00 → 50.00 | ×2.5; wiki")
    assert shown["Parameters of blocks"] == "25.0% removed | 2,000 → 1,600; 20.0% of all that there were"
    assert shown["Checkpoint"] == "8.0 kB → 6.4 kB | ×0.80; both in its dtype"  # 6400 * 2000 / 1600
    assert shown["Decoding, tokens per second"].startswith("20 → 30 | ×1.50")
    assert shown["Time to shrink"] == "10 s | peak memory 2.0 MB; 2 threads, cpu"
    assert "not measured" not in found.words
    assert len(table(found, "Every recorded evaluation")) == 2


def test_what_went_is_in_tables(tmp_path: Path, shrunk: Json) -> None:
    found = page(tmp_path, shrunk)
    assert table(found, "What its config.json says") == [
        ["intermediate_size", "1536", "1152"],
        ["num_hidden_layers", "4", "3"],
        ["head_dim", "not said", "8"],
        ["layer_types", "a, b, a and b", "a, b and b"],
    ]
    assert table(found, "Parameters") == [
        ["All", "2000", "1600", repr(1 - 1600 / 2000)],
        ["Of blocks", "1600", "1200", "0.25"],
    ]
    assert (
        "1 block removed, one after the other, each time the one without which predictions change least: 2 as the "
        "whole model counts them."
    ) in found.words
    assert "To be removed were 25.0% of the blocks' parameters" in found.words


def test_what_was_tried_has_its_numbers(tmp_path: Path, shrunk: Json) -> None:
    found = page(tmp_path, shrunk)
    assert table(found, "Ways to take 25.0% of the parameters") == [
        ["50.0% of the neurons removed", "0.75", ""],
        ["1 groups of heads left and 12.5% of the neurons removed", "0.5", "taken"],
    ]
    assert table(found, "Without each block") == [["0", "2.0"], ["1", "1.0"], ["2", "0.25"], ["3", "0.5"]]
    # Of block 0 experts 0 (1.0) and 2 (2.0) went, and the weaker that stayed is 1 (3.0).
    assert table(found, "Experts:") == [["0", "0 and 2", "2.0", "3.0"], ["2", "2 and 3", "6.0", "7.0"]]
    assert table(found, "Time before the first block") == [
        ["Choosing the last block that went", "2.0"],
        ["Observing experts", "1.0"],
        ["Trying out heads and neurons", "3.0"],
    ]


def test_what_every_cut_did_is_a_picture_with_its_numbers(tmp_path: Path, shrunk: Json) -> None:
    found = page(tmp_path, shrunk)
    # Of the experts: (8 * 0.125 + 24 * 0.25) / 32.
    assert table(found, "Output error, |Y") == [["0", "0.5", "0.21875"], ["1", "0.75", ""]]
    assert table(found, "Output errors") == [["0", "0.25"], ["1", "0.5"]]
    assert table(found, "Time for each block") == [["0", "1.5"], ["1", "2.5"]]
    assert sorted(titles(found)) == [
        "Output error of each block", "Output error of each kind of matrix", "Time for each block",
        "Without each block, the last time that one was chosen",
    ]  # fmt: skip


def test_one_kind_of_matrix_is_a_line_over_the_blocks(tmp_path: Path, shrunk: Json) -> None:
    shrunk["matrices"] = [one for one in shrunk["matrices"] if "o_proj" in one["name"]]
    found = page(tmp_path, shrunk)
    assert "Output error of attn.o_proj" in titles(found)
    assert table(found, "Output error, |Y") == [["0", "0.5"], ["1", "0.75"]]


def test_what_is_not_known_is_said(tmp_path: Path, shrunk: Json) -> None:
    shrunk["plan"] |= {"criterion": "flap", "compensate": False, "propagate": "sequential"}
    for one in (*shrunk["matrices"], *shrunk["blocks"]):
        one["output_error"] = None
    words = page(tmp_path, shrunk).words
    assert "each matrix after a cut kept its other weights as they were" in words
    assert "Their output errors are not known: flap without compensation takes no Gram matrix" in words
    assert "Output errors of blocks are not measured with propagate sequential." in words


@pytest.mark.parametrize(
    ("depth", "layers", "pictured", "words"),
    [
        ("influence", 1, True, "those that change the hidden state least"),
        ("random", 1, False, "by chance"),
        ("kl", [2], False, "named by the user"),
    ],
)
def test_how_blocks_were_chosen(
    tmp_path: Path, shrunk: Json, depth: str, layers: object, pictured: bool, words: str
) -> None:
    shrunk["plan"] |= {"depth": depth, "layers": layers, "calibration": None}
    step = {"step": "layers", "removed": [2], "influence": [0.5, 0.25, 0.125, 1.0], "seconds": 2.0}
    shrunk["steps"] = [] if isinstance(layers, list) else [step]
    found = page(tmp_path, shrunk)
    assert f"1 block removed, {words}: 2 as" in found.words
    assert "none: nothing was observed" in found.words
    assert ("Influence of each block" in titles(found)) == pictured
    if pictured:
        assert table(found, "Influence of each block") == [["0", "0.5"], ["1", "0.25"], ["2", "0.125"], ["3", "1.0"]]


def test_runs_of_blocks_stand_where_they_begin(tmp_path: Path, shrunk: Json) -> None:
    shrunk["steps"][0]["tried"] = {"(0, 1)": 3.0, "(10, 11)": 1.0, "(12, 13)": None}
    assert table(page(tmp_path, shrunk), "Without each block") == [["0", "3.0"], ["10", "1.0"]]


def test_an_unfinished_run_tells_what_was_tried(tmp_path: Path, shrunk: Json) -> None:
    path = save_run(tmp_path / "half.secateur", shrunk, 1)
    for name, count in (("source-layers", 4), ("source-narrow", 3), ("source-0", 4)):
        (path / name).mkdir()
        (path / name / "config.json").write_text(f'{{"num_hidden_layers": {count}}}')
    found = page_of(load_records(path))
    assert found.all("h1")[0].words == "tiny, to be shrunk"
    assert "Blocks cut so far: 1 of 3." in found.words and "This run is not finished" in found.words
    shown = cards(found)
    assert shown["Perplexity"].startswith("20.00 | of the dense model")
    assert shown["Time so far"] == "7.5 s | 2 threads, cpu"  # 2 + 1 + 3 + 1.5
    assert len(table(found, "Ways to take")) == 2 and table(found, "Output errors") == [["0", "0.25"]]


def test_a_packed_model_keeps_the_story_of_its_shrinking(tmp_path: Path, shrunk: Json) -> None:
    found = page(tmp_path, packed_report(shrunk, "int8"))
    assert found.all("h1")[0].words == "out, packed as bitmask, values int8"
    assert "Of 1,600 parameters of its blocks 25.00% were removed" in found.words
    assert len(table(found, "What its config.json says")) == 4 and len(table(found, "Output errors")) == 2
    assert cards(found)["Perplexity"].startswith("20.00 → 50.00")
    heads = [h.words for h in found.all("h3")]
    assert "The command that shrank it" in heads and "The command that packed it" in heads


def test_the_command_is_shown(tmp_path: Path, shrunk: Json) -> None:
    line = page(tmp_path, shrunk).all("pre")[0].words
    assert line == (
        "secateur shrink tiny out --layers 1 --experts 0.5 --target 0.25 --samples 4 --seed 7 --propagate block "
        "--evaluate wikitext2"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("config", {"a": [1]}), ("config", {"a": 3}), ("kept", [["x"]]), ("steps", [{"step": "split"}])]
)
def test_damage_is_an_error_of_one_line(tmp_path: Path, shrunk: Json, key: str, value: object) -> None:
    damaged = copy.deepcopy(shrunk)
    (damaged["steps"][1] if key == "kept" else damaged)[key] = value
    with pytest.raises(DataError, match="damaged"):
        page(tmp_path, damaged)


@pytest.mark.parametrize("damage", [{"seconds": "x"}, {"kl": [1]}, {"step": 3}])
def test_a_damaged_step_of_an_unfinished_run_is_an_error_of_one_line(
    tmp_path: Path, shrunk: Json, damage: Json
) -> None:
    shrunk["steps"][2] |= damage
    with pytest.raises(DataError, match=r"a step: .* damaged"):
        load_records(save_run(tmp_path / "half.secateur", shrunk, 1))


def test_a_real_shrunk_model_has_a_page(tmp_path: Path, model_directory) -> None:  # type: ignore[no-untyped-def]
    made = shrink(model_directory("qwen3"), tmp_path / "out", target=0.3, round=8, calibration=rows(6, 24))
    found = Tree(report(tmp_path / "out", output=tmp_path / "r.html").read_text()).open[0]
    assert table(found, "What its config.json says") == [[k, *map(str, v)] for k, v in made["config"].items()]
    [split] = made["steps"]
    assert {way: float(kl) for way, kl, _ in table(found, "Ways to take 30.0%")} == split["kl"]
    errors = table(found, "Output error, |Y")
    assert [float(error) for _, error in errors] == [matrix["output_error"] for matrix in made["matrices"]]
    assert render_page(load_records(tmp_path / "out")) == (tmp_path / "r.html").read_text()

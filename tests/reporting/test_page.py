"""A page says what was recorded, to anybody, whatever was recorded."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest

from html_pages import Node, Tree, cards, page_of, table
from report_data import HOSTILE, Json, packed_report, poisoned, row, save_output, save_run
from secateur.reporting.commands import making_command
from secateur.reporting.page.blocks import by_kind
from secateur.reporting.page.charts import heat_levels, kind_labels
from secateur.reporting.page.pictures import HEAT, log_ticks
from secateur.reporting.page.records import Records, load_records
from secateur.reporting.page.render import render_page
from secateur.reporting.page.wording import tidy

Html = Callable[[str], str]

KINDS = [
    "pruned", "full", "packed", "packed int8", "shrunk", "shrunk packed", "shrunk unfinished", "shrunk hostile",
    "unfinished", "hostile", "comparison", "models", "hostile comparison",
    "dense only", "one row", "no rows", "beyond",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_well_formed_complete_in_itself_and_can_be_read_aloud(page_as_html: Html, kind: str) -> None:
    html = page_as_html(kind)
    assert html.encode() and html.startswith("<!DOCTYPE html>")
    page = Tree(html).open[0]
    nodes = [page, *(n for tag in {tag for tag in re.findall(r"<([a-zA-Z]\w*)", html)} for n in page.all(tag.lower()))]
    ids = Counter(node["id"] for node in nodes if "id" in node.attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for node in nodes:
        for name, value in node.attributes.items():
            assert not re.search(r"https?:|url\((?!#)|//", value or "") or name == "value" or node.tag == "meta"
            wanted = (value or "").split() if name in ("aria-labelledby", "aria-describedby") else []
            wanted += [value[1:]] if value and name == "href" and value.startswith("#") else []
            wanted += re.findall(r"url\(#([^)]+)\)", value or "")
            assert set(wanted) <= ids.keys()
    assert not page.all("script") and not page.all("img") and "@import" not in html and "url(http" not in html
    assert page.all("html")[0]["lang"] == "en"
    assert [meta for meta in page.all("meta") if meta.attributes.get("name") == "viewport"]
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1", "title")][:5] == [1] * 5
    levels = [int(tag) for tag in re.findall(r"<h([1-6])", html)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    for svg in page.all("svg"):
        named = {inner["id"]: inner.words for inner in svg.inside if inner.tag in ("title", "desc")}
        assert svg["role"] == "img" and svg["aria-labelledby"].split() == list(named) and all(named.values())
        assert not re.search("#0[0-9a-f]{5}|DejaVu|mathdefault", " ".join(str(n.attributes) for n in svg.all("path")))
    assert len(page.all("details")) == len(page.all("svg"))
    for found in page.all("table"):
        assert found.all("caption")[0].words and all("scope" in head.attributes for head in found.all("th"))


@pytest.mark.parametrize("kind", ["full", "models"])
def test_the_same_data_gives_the_same_bytes_whatever_pictures_were_set_to(
    every_kind: dict[str, Path], page_as_html: Html, kind: str
) -> None:
    records = load_records(every_kind[kind])
    first = page_as_html(kind)
    with matplotlib.rc_context(
        {
            "font.size": 30,
            "axes.grid": False,
            "axes.labelsize": 40,
            "xtick.direction": "in",
            "svg.fonttype": "path",
            "axes.titlecolor": "red",
        }
    ):
        assert render_page(records) == first
        assert matplotlib.rcParams["font.size"] == 30


def test_hostile_text_is_shown_and_does_nothing(page_as_html: Html) -> None:
    for kind in ("hostile", "hostile comparison"):
        page = Tree(page_as_html(kind)).open[0]
        seen = page.words
        assert "<script>alert(1)</script>" in seen and "␛[31mred" in seen and "[U+202E]gnp.exe[U+202C]" in seen
        assert "{{ 7*7 }}" in seen and "$x^2$" in seen and "&amp; line" in seen and "[U+D800]" in seen
        assert not page.all("script") and not re.search("[\x00-\x08\x1b\u202a-\u202e\ud800-\udfff]", seen)


def test_hostile_names_stay_short_in_headings_and_pictures(page_as_html: Html) -> None:
    page = Tree(page_as_html("hostile comparison")).open[0]
    texts = [text.words for svg in page.all("svg") for text in svg.all("text")]
    assert any("<script>" in text for text in texts)  # shown as it is, and not as mathematics
    assert max(map(len, texts)) < 60 and len(page.all("h1")[0].words) < 200


def test_what_a_pruning_did_cost_and_gained(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    page = page_of(load_records(save_output(tmp_path / "out", pruned, lines)))
    assert page.all("h1")[0].words == "tiny, 50% removed by sparsegpt"
    shown = cards(page)
    assert shown["Perplexity"] == "20.00 → 50.00 | ×2.5; wiki, 4 windows of 8 tokens, 32 of 99 tokens"
    assert shown["Sparsity"].startswith("50.00% | 32 of 64 weights in 4 matrices")
    assert shown["Checkpoint"].startswith("1.0 kB → 750 B | ×0.75")
    assert shown["Resident memory"] == "2.0 kB → 500 B | ×0.25; dense → out"
    assert shown["Decoding, tokens per second"].startswith("20 → 30 | ×1.50; batch 1; EPYC, 2 threads")
    assert shown["Same likeliest token"].startswith("75.0% | as the dense model; mean KL divergence 0.5 nats")
    assert shown["Zero-shot accuracy"].startswith("60.0% → 55.0% | −5.0 points")  # (.5 + .7) / 2, (.4 + .7) / 2
    assert shown["Time to prune"] == "4.0 s | peak memory 2.0 MB; 2 threads, cpu"
    assert "not measured" not in page.words


def test_differences_are_right(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    page = page_of(load_records(save_output(tmp_path / "out", pruned, lines)))
    assert table(page, "Quality before and after") == [
        ["Loss, nats per prediction", "3.0", "4.0", "1.0", repr(4 / 3)],
        ["Perplexity", "20.0", "50.0", "30.0", "2.5"],
    ]
    arc, piqa = table(page, "Tasks.")
    assert arc == ["arc (0 shots)", "acc", "100", "0.5", "0.4", repr(0.4 - 0.5), "0.05"]  # 3-4-5
    assert piqa[3:6] == ["0.7", "0.7", "0.0"]
    speeds = table(page, "Size and speed")
    assert speeds[1:] == [
        ["Resident memory", "500", "2000", "0.25"],
        ["Prefill, batch 1, tokens/s", "30.0", "20.0", "1.5"],
        ["Decode, batch 1, tokens/s", "30.0", "20.0", "1.5"],
    ]
    assert "30 (15 to 60)" in page.words


def test_every_picture_of_a_model_has_the_recorded_numbers(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    page = page_of(load_records(save_output(tmp_path / "out", pruned, lines)))
    # Of the experts: (2 zeros + 18 zeros) / (8 + 24), and (8 * 0.125 + 24 * 0.5) / 32.
    assert table(page, "Sparsity, zeros / weights") == [["0", "0.5", "0.625"], ["1", "0.25", ""]]
    assert table(page, "Output error, |Y") == [["0", "0.125", "0.40625"]]
    assert table(page, "Output errors") == [["0", "0.25"], ["1", "0.5"]]
    assert table(page, "Time for each block") == [["0", "1.5"], ["1", "2.5"]]
    assert table(page, "Relative distance") == [["0", "0.0625"], ["1", "0.375"]]
    heads = [svg.all("title")[0].words for svg in page.all("svg")]
    assert sorted(heads) == [
        "Distance from the dense model after each block", "Output error of each block",
        "Output error of each kind of matrix", "Sparsity of each kind of matrix", "Time for each block",
        "Zero-shot tasks before and after",
    ]  # fmt: skip


def test_how_a_pruning_was_refined(tmp_path: Path, refined: Json) -> None:
    page = page_of(load_records(save_output(tmp_path / "out", refined)))
    assert table(page, "Slopes tried") == [["−0.1", ""], ["0", "0.5"], ["0.1", "0.25"]]
    assert table(page, "Held-out errors") == [["0", "0.5", "0.25"], ["1", "0.25", "0.125"]]
    assert "Reconstruction of each block" in [svg.all("title")[0].words for svg in page.all("svg")]
    [facts] = [dl for dl in page.all("dl") if dl.attributes.get("class") == "facts"]
    told = {dt.words: dd.words for dt, dd in zip(facts.all("dt"), facts.all("dd"), strict=True)}
    assert told["Method"] == "wanda, then swaps, then pcg (iterations=5)" and told["Preset"] == "best"
    assert told["Allocation"] == "linear, mean sparsity 50.00%; of 3 slopes, 0.1 changes predictions least"
    assert told["Reconstruction"] == (
        "at most 8 epochs for each block, learning rate 0.002; mean held-out error 0.375 before and 0.1875 after"
    )
    [command] = page.all("pre")  # and no file of rules, which the allocation's name stands for
    assert "--allocation linear" in command.words and "--preset best" in command.words


def test_a_reconstruction_beyond_measure_is_left_out(tmp_path: Path, refined: Json) -> None:
    refined["blocks"][0]["reconstruction"]["error_before"] = float("inf")
    page = page_of(load_records(save_output(tmp_path / "out", refined)))
    assert table(page, "Held-out errors") == [["1", "0.25", "0.125"]]


def test_what_was_not_measured_is_said_with_the_command_that_measures_it(tmp_path: Path, pruned: Json) -> None:
    pruned["evaluation"] = None
    page = page_of(load_records(save_output(tmp_path / "my out", pruned)))
    shown = cards(page)
    assert shown["Resident memory"] == "not measured: give secateur bench 'my out' --against tiny"
    assert shown["Perplexity"] == shown["Same likeliest token"]
    assert shown["Perplexity"] == "not measured: give secateur eval 'my out' --against tiny"
    assert "What it writes" not in page.words and "Evaluations so far" not in page.words


def test_the_last_evaluation_counts(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    newer = {**lines[0], "fidelity": {"kl": 0.25, "top1": 0.875, "blocks": []}}
    page = page_of(load_records(save_output(tmp_path / "out", pruned, [*lines, newer])))
    assert cards(page)["Same likeliest token"].startswith("87.5%")
    assert "→ 30" in cards(page)["Decoding, tokens per second"]  # which the newer one did not measure


def test_a_dollar_is_a_dollar(comparison: Json) -> None:
    comparison["rows"] = [row("a $x_1$", "row", 0.5, 7.0)]
    page = page_of(Records("comparison", "c", comparisons=[comparison]))
    assert "a $x_1$, row" in [text.words for text in page.all("svg")[0].all("text")]


def test_generations_stand_side_by_side(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    page = page_of(load_records(save_output(tmp_path / "out", pruned, lines)))
    [sample] = page.all("article")
    assert sample.all("blockquote")[0].words == "Once upon"
    assert [dt.words for dt in sample.all("dt")] == ["tiny 0% repeated", "out 75% repeated"]
    assert [dd.words for dd in sample.all("dd")] == ["a time", "a a a a a"]


def test_evaluations_are_listed_with_their_dates(tmp_path: Path, pruned: Json, lines: list[Json]) -> None:
    page = page_of(load_records(save_output(tmp_path / "out", pruned, lines)))
    first, second = table(page, "Every recorded evaluation")
    assert first[0] == "2026-11-22 13:00:00 UTC" and first[2:4] == ["50.0", "0.5"]
    assert second[:3] == ["2026-11-23 08:00:00 UTC", "speed and memory", ""]


def test_a_packed_model_keeps_the_story_of_its_pruning(tmp_path: Path, pruned: Json) -> None:
    page = page_of(load_records(save_output(tmp_path / "small", packed_report(pruned))))
    assert page.all("h1")[0].words == "out, packed as bitmask"
    assert (
        cards(page)["Checkpoint"] == "1.0 kB → 640 B | ×0.64; 4 packed: 0.5781 of their dense bytes, 0.5625 predicted"
    )
    assert cards(page)["Perplexity"].startswith("20.00 → 50.00 | ×2.5; of the pruned model, before it was packed")
    assert table(page, "Bytes on disk")[-1] == ["4 packed matrices, packed", "74", "74"]
    codes = [code.words for code in page.all("pre")]
    assert codes[0].startswith("secateur prune tiny out --method sparsegpt")
    assert codes[1] == "secateur pack out small"


def test_rounded_values_are_not_passed_off_as_evaluated(tmp_path: Path) -> None:
    page = page_of(load_records(save_output(tmp_path / "small", packed_report(None, "int8"))))
    assert "rounded the values to 8 bits, and the quality after that was not measured" in page.words


def test_an_unfinished_run_says_so(tmp_path: Path, pruned: Json) -> None:
    path = save_run(tmp_path / "half.secateur", pruned, 1)
    (path / "source-0").mkdir()
    (path / "source-0/config.json").write_text('{"text_config": {"num_hidden_layers": 2}}')
    page = page_of(load_records(path))
    assert "Blocks pruned so far: 1 of 2." in page.words and "This run is not finished" in page.words
    assert cards(page)["Perplexity"].startswith("20.00 | of the dense model")
    assert "bench" not in page.words  # there is nothing yet that could be measured


def test_a_plan_gives_its_command_back(pruned: Json) -> None:
    plan = pruned["plan"]
    words = shlex.split(making_command(plan, "my out"))
    assert words[:4] == ["secateur", "prune", "tiny", "my out"]
    given = dict(zip(words[4::2], words[5::2], strict=True))
    assert given == {
        "--method": "sparsegpt", "--pattern": "row", "--samples": "4", "--seed": "7", "--exclude": "lm head",
        "--evaluate": "wikitext2",
    }  # fmt: skip  # no --seqlen: it was not given, and the evaluation would take it too
    plan |= {"pattern": "2:4", "evaluate": None, "format": "nm", "values": "int8", "allocation": {"0": 0.1}}
    line = making_command(plan, "o")
    assert "--sparsity" not in line and "--seqlen 8" in line and "--format nm" in line and "--values int8" in line
    assert "--allocation allocation.yaml" in line
    plan["method"] = "one of my own"
    assert making_command(plan, "o") is None


def test_an_allocation_is_shown_in_full(tmp_path: Path, pruned: Json) -> None:
    pruned["plan"]["allocation"] = {"layers.0": 0.25}
    page = page_of(load_records(save_output(tmp_path / "out", pruned)))
    assert json.loads(page.all("pre")[1].words) == {"layers.0": 0.25}


def test_an_unfinished_comparison_says_so(tmp_path: Path) -> None:
    document = {"schema": 1, "rows": [row("dense", None, 0.0, 20.0)], "planned": 3}
    (tmp_path / "comparison.json").write_text(json.dumps(document))
    assert "Unfinished: 1 of 3 rows" in render_page(load_records(tmp_path))
    (tmp_path / "comparison.json").write_text(json.dumps({**document, "planned": 1}))
    assert "Unfinished" not in render_page(load_records(tmp_path))


def test_a_comparison_shows_every_row_and_picture(page_as_html: Html) -> None:
    page = Tree(page_as_html("comparison")).open[0]
    assert table(page, "Perplexity against sparsity") == [
        ["dense", "0.0", "20.0"],
        ["wanda, row, 50%", "0.5", "40.0"],
        ["wanda, row, 25%", "0.25", "25.0"],
        ["wanda, 2:4, 50%", "0.5", "80.0"],
        ["ria, matrix, 50%", "0.5", "35.0"],
    ]
    assert table(page, "Perplexity against bytes")[1] == ["wanda, row, 50%", "600", "40.0"]
    assert table(page, "Perplexity against speed") == [["dense", "10.0", "20.0"], ["wanda, row, 50%", "25.0", "40.0"]]
    means = table(page, "Zero-shot accuracy")
    assert means == [["dense", "0.6", "0.025"], ["wanda, row, 50%", "0.4", "0.06"]]  # half of 0.05
    assert len(table(page, "tiny: wiki")) == 6
    assert table(page, "Rows that failed") == [["tiny", "ria, matrix, 75%", "out of memory; make room"]]
    assert cards(page)["Best at 50%"].startswith("35.00 | ria, matrix") and "1 row failed." in page.words
    texts = [text.words for text in page.all("svg")[0].all("text")]
    assert {"wanda, row", "wanda, 2:4", "ria, matrix", "dense 20.00", "Sparsity, zeros / weights"} <= set(texts)


def test_only_rows_of_one_model_and_text_share_a_picture(page_as_html: Html, comparison: Json) -> None:
    page = Tree(page_as_html("models")).open[0]
    sizes = table(page, "Loss increase against the model's size, at 50%")
    assert sizes[0] == ["tiny", "wanda, row", "1000", "0.25"] and sizes[-1] == ["larger", "ria, matrix", "4000", "0.25"]
    other = row("wanda", "row", 0.3, 7.0)
    other["evaluation"]["text"] = "another"
    comparison["rows"].append(other)
    page = page_of(Records("comparison", "c", comparisons=[comparison]))
    found = [t.words for svg in page.all("svg") for t in svg.all("title") if "against sparsity" in t.words]
    assert len(found) == 2 and "cannot be compared" in page.words


def test_what_is_beyond_measure_is_named_and_not_drawn(page_as_html: Html) -> None:
    page = Tree(page_as_html("beyond")).open[0]
    assert "in no picture of perplexity: wanda, row, 50%" in page.words
    assert [cells[0] for cells in table(page, "Perplexity against sparsity")] == ["dense", "ria, row, 50%"]
    assert table(page, "tiny: wiki")[1][2] == "beyond measure"


def marks(svg: Node) -> set[tuple[str, str]]:
    """Outline and style of every mark of a series."""
    outlines = {path["id"]: path["d"] for path in svg.all("path") if "id" in path.attributes}
    return {(outlines[use["href"][1:]], use["style"]) for use in svg.all("use") if "series" in use["style"]}


def test_one_mark_and_one_colour_of_a_method_on_all_pictures(page_as_html: Html) -> None:
    by_sparsity, by_bytes = map(marks, Tree(page_as_html("comparison")).open[0].all("svg")[:2])
    assert len(by_sparsity) == 3 and len(by_bytes) == 4  # with the dense model's
    assert by_sparsity < by_bytes
    assert len({outline for outline, _ in by_bytes}) == 4  # told apart without colours


def test_levels_of_heat_maps_hold_all_values_in_no_more_classes_than_colours() -> None:
    for low in (0.0, 0.1, 0.37, -3.0, 5e-9, 1e6):
        for spread in (0.0, 1e-12, 0.019, 0.3, 1.0, 7.7, 1e5):
            levels = heat_levels([low, low + spread / 3, low + spread], fractions=low + spread <= 1)
            assert levels == sorted(set(levels)) and len(levels) - 1 <= len(HEAT)
            assert levels[0] <= low and levels[-1] >= low + spread - 1e-9 * (abs(low) + spread)


def test_ticks_of_logarithmic_axes_are_a_handful_and_inside() -> None:
    for low, high in [(28, 80), (20, 21), (1, 1e299), (5.1, 5.2), (0.01, 3000), (9.9, 10.1)]:
        ticks = log_ticks(low, high)
        assert 2 <= len(ticks) <= 7 and low * 0.99 <= ticks[0] and ticks[-1] <= high * 1.01


def test_kinds_are_told_apart_by_as_little_as_needed() -> None:
    assert kind_labels(["attn.q_proj", "mlp.up", "other.up", "fc"]) == ["q_proj", "mlp.up", "other.up", "fc"]


def test_matrices_without_a_number_do_not_count() -> None:
    matrices = [
        {"name": "h.0.a", "block": 0, "shape": [2, 2], "e": None},
        {"name": "h.0.b.1", "block": 0, "shape": [1, 3], "e": 1},
        {"name": "h.0.b.0", "block": 0, "shape": [1, 1], "e": 5},
    ]  # fmt: skip
    assert by_kind(matrices, "e") == {("b.*", 0): 2.0}


def test_tidying_twice_is_tidying_once() -> None:
    once = tidy(poisoned({"a": [HOSTILE, float("nan"), 10**400, 3, True, None]}))
    assert tidy(once) == once and once["a"][1:] == [None, None, 3, True, None]


@pytest.mark.parametrize("name", ["page.wording", "page.pictures", "page.blocks", "page.plots", "pruned"])
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"secateur.reporting.{name}"))
    assert found.attempted and not found.failed

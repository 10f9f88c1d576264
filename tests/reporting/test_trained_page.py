"""The page of a trained model: how its losses went, what became of its zeros, what it won and what it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from html_pages import Node, Tree, cards, page_of, table
from report_data import (
    Json,
    a_course,
    a_shrinking,
    a_training,
    packed_report,
    perplexity,
    save_output,
    save_training,
)
from secateur.api import finetune, prune, report
from secateur.errors import DataError
from secateur.reporting.page.records import load_records
from secateur.reporting.page.render import render_page
from tiny import TEXT


def page(tmp_path: Path, document: Json, lines: list[Json] = []) -> Node:  # noqa: B006  never changed
    return page_of(load_records(save_output(tmp_path / "out", document, lines)))


def titles(page: Node) -> list[str]:
    return [svg.all("title")[0].words for svg in page.all("svg")]


def lead(page: Node) -> str:
    return next(p.words for p in page.all("p") if p.attributes.get("class") == "lead")


def facts(page: Node, section: str) -> list[list[str]]:
    [found] = [one for one in page.all("section") if one.attributes.get("id") == section]
    lists = [one for one in found.all("dl") if one.attributes.get("class") != "cards"]
    names, values = ([node.words for one in lists for node in one.all(tag)] for tag in ("dt", "dd"))
    return [list(pair) for pair in zip(names, values, strict=True)]


def test_what_was_trained_what_it_won_and_what_it_cost(tmp_path: Path, trained: Json) -> None:
    found = page(tmp_path, trained)
    assert found.all("h1")[0].words == "thin, trained for 6 steps, 50% of its weights zero"
    assert lead(found) == (
        "Trained for 6 steps on c4: LoRA adapters of rank 4 under the mask, merged in the end, 1,200 in all. Of 64 "
        "weights in its matrices, 32 (50.00%) are zero, 50.00% before: every zero was kept. Its perplexity on wiki is "
        "30.00; 50.00 before training. The checkpoint takes 750 B."
    )
    shown = cards(found)
    assert shown["Perplexity"].startswith("50.00 → 30.00 | ×0.6; wiki")
    assert shown["Sparsity"] == "50.00% | 32 of 64 weights; every zero was kept"
    assert shown["On held-out rows"] == "5.000 → 4.000 | ×0.80; loss, nats per token, 2 rows"
    assert shown["Checkpoint"].startswith("1.0 kB → 750 B")
    assert shown["Same likeliest token"] == "not measured: give secateur eval out --against tiny"  # the first of all
    assert shown["Time to train"] == "20 s | peak memory 2.0 MB; 2 threads, cpu"
    assert "The model is that of step 6 of 8, whose loss on held-out rows was lowest." in found.words


def test_the_course_of_training_is_a_picture_with_its_numbers(tmp_path: Path, trained: Json) -> None:
    found = page(tmp_path, trained)
    assert table(found, "Loss, nats per token") == [
        ["0", "", "5.0"], ["2", "4.5", "4.75"], ["4", "4.0", "4.25"], ["6", "3.5", "4.0"], ["8", "3.0", "4.5"],
    ]  # fmt: skip
    picture = found.all("svg")[titles(found).index("The course of training")]
    assert picture.all("desc")[0].words == (
        "Loss: on training rows 4.5 at step 2 and 3 at step 8, lowest at step 8, 3; on held-out rows 5 at step 0 and "
        "4.5 at step 8, lowest at step 6, 4."
    )
    texts = {text.words for text in picture.all("text")}
    assert {"training rows", "held-out rows", "kept, step 6", "Step", "Loss, nats per token"} <= texts


def test_losses_that_are_no_numbers_are_left_out(tmp_path: Path, trained: Json) -> None:
    trained["training"] |= {"losses": [[2, 4.5], [4, float("nan")]], "held_out": [[0, float("inf")]], "stopped": 4}
    found = page(tmp_path, trained)
    assert table(found, "Loss, nats per token") == [["2", "4.5", ""]]
    assert "The loss became NaN or infinite in step 4; the model is that of step 6 of 8." in found.words
    assert "On held-out rows" not in cards(found)


def test_without_any_losses_there_is_no_picture(tmp_path: Path, trained: Json) -> None:
    trained["training"] |= {"losses": [], "held_out": [], "held_out_rows": 0}
    found = page(tmp_path, trained)
    assert "The course of training" not in titles(found) and "nothing tells whether training did harm" in found.words


def test_a_training_that_won_nothing_says_so(tmp_path: Path, trained: Json) -> None:
    assert "did not lower" not in page(tmp_path, trained).words
    trained["training"]["held_out"] = [[0, 3.5], [6, 4.0]]
    (tmp_path / "worse").mkdir()
    words = page(tmp_path / "worse", trained).words
    assert "Training did not lower the loss on held-out rows: 3.500 before, 4.000 now." in words


def test_where_the_zeros_are(tmp_path: Path, trained: Json) -> None:
    # By block, which the name tells: the head is in none.
    assert table(page(tmp_path, trained), "Sparsity, zeros / weights") == [["0", "0.5", "0.75"], ["1", "0.25", ""]]


def test_what_it_was_before(tmp_path: Path, trained: Json) -> None:
    found = page(tmp_path, {**trained, "former": a_training(packed_report(a_shrinking()))})
    assert facts(found, "training") == [
        ["Trained", "LoRA adapters of rank 4 under the mask, merged in the end"],
        ["Learnt", "the text"],
        ["Text", "20 rows of c4, 160 tokens"],
        ["Held out", "2 rows"],
        ["Steps", "8 were asked for, each of 6 rows"],
        ["Learning rate", "0.001 at its highest"],
        ["Kept", "the model of step 6"],
        ["Before", "shrunk: parts of its blocks were removed"],
        ["Before", "packed"],
        ["Before", "trained for 6 steps, 50% of its weights zero, LoRA adapters of rank 4 under the mask, merged in "
                   "the end, on c4"],
    ]  # fmt: skip
    heads = [head.words for head in found.all("h3") if head.words.startswith("The command")]
    did = ["shrank", "packed", "trained", "trained"]
    assert heads == [f"The command that {verb} it" for verb in did]
    lines = [code.words.split(" --")[0] for code in found.all("pre")]
    assert lines == [
        "secateur shrink tiny out", "secateur pack out thin", "secateur finetune thin thin",
        "secateur finetune thin out",
    ]  # fmt: skip


def test_perplexities_of_the_whole_way(tmp_path: Path, trained: Json) -> None:
    found = page(tmp_path, trained)  # the pruned model, of which 50.00 is known twice
    assert table(found, "Perplexity on the way") == [["before", "20.0"], ["pruned", "50.0"], ["trained", "30.0"]]
    trained["former"]["evaluation"] = {"before": perplexity(3.0, 20.0, "sotu"), "after": perplexity(4.0, 50.0, "sotu")}
    (tmp_path / "other").mkdir()
    assert "on the way" not in page(tmp_path / "other", trained).words


def test_a_model_pruned_on_the_way(tmp_path: Path) -> None:
    document = {**a_training(), "sparsity": 0.6, "sparsity_before": 0.25}
    document["plan"] |= {"course": a_course(allocation={"0": 0.25}), "teacher": {"name": "big", "digest": "9f"}}
    document["training"] |= {"loss": "divergence"}
    found = page(tmp_path, document)
    assert found.all("h1")[0].words == "thin, pruned to 60% in 6 steps of training"
    assert "to predict as big does" in lead(found)
    assert "pruned on the way to 60.0% by wanda gradually from 25.0%, with a new mask every 2 steps" in lead(found)
    assert cards(found)["Sparsity"].startswith("25.00% → 60.00% | 32 of 64 weights; pruned on the way")
    assert cards(found)["On held-out rows"].startswith("5.000 → 4.000 | ×0.80; divergence from the teacher")
    assert table(found, "Sparsity of all matrices") == [["Zeros / weights", "0.25", "0.6"]]
    assert len(table(found, "Divergence from the teacher, nats per token")) == 5
    assert ["Learnt", "the predictions of big"] in facts(found, "training")
    told = facts(found, "reproduce")
    assert ["Teacher", "big"] in told and ["Digest of the teacher (SHA-256)", "9f"] in told
    assert ["Training text", "20 sequences of 8 tokens, 160 in all, of c4; seed 7"] in told
    codes = [code.words for code in found.all("pre")]
    assert codes[0].startswith("secateur finetune thin out --data c4") and json.loads(codes[1]) == {"0": 0.25}


def test_a_packed_model_keeps_the_story_of_its_training(tmp_path: Path, trained: Json) -> None:
    found = page(tmp_path, packed_report(trained, "int8"))
    assert found.all("h1")[0].words == "out, packed as bitmask, values int8"
    assert "every zero was kept" in lead(found)
    assert cards(found)["Perplexity"].startswith("50.00 → 30.00 | ×0.6; of the trained model, before it was packed")
    assert "The course of training" in titles(found) and len(table(found, "Sparsity, zeros / weights")) == 2
    heads = [h.words for h in found.all("h3") if h.words.startswith("The command")]
    assert heads == [f"The command that {did} it" for did in ("pruned", "trained", "packed")]


def test_evaluations_that_come_later_are_shown(tmp_path: Path, trained: Json, lines: list[Json]) -> None:
    trained["evaluation"] = None
    found = page(tmp_path, trained, lines)
    assert "Its perplexity on wiki is 50.00; 20.00 of tiny." in lead(found)
    assert cards(found)["Decoding, tokens per second"].startswith("20 → 30 | ×1.50")
    assert len(table(found, "Every recorded evaluation")) == 2


def test_an_unfinished_training_says_how_far_it_is(tmp_path: Path, trained: Json) -> None:
    found = page_of(load_records(save_training(tmp_path / "half.secateur", trained, 3)))
    assert found.all("h1")[0].words == "thin, to be trained"
    assert lead(found) == "Trained so far: 6 of 8 steps, as far as the last checkpoint."
    assert "This run is not finished" in found.words and titles(found) == []
    shown = cards(found)
    assert shown["Steps finished"] == "6 of 8 steps | as the journal says"
    assert shown["Perplexity"].startswith("50.00 | of the model before training")
    assert shown["Time so far"] == "7.5 s | 2 threads, cpu"  # 3 * 2.5
    assert found.all("pre")[0].words.startswith("secateur finetune thin half --data c4")


def test_a_training_that_was_killed_after_its_end_has_its_losses(tmp_path: Path, trained: Json) -> None:
    found = page_of(load_records(save_training(tmp_path / "half.secateur", trained, 4, ended=True)))
    assert lead(found).startswith("Trained so far: 8 of 8 steps")
    assert len(table(found, "Loss, nats per token")) == 5 and len(table(found, "Sparsity, zeros / weights")) == 2


def test_a_training_of_which_nothing_is_saved_yet_has_a_page(tmp_path: Path, trained: Json) -> None:
    path = save_training(tmp_path / "half.secateur", trained, 0)
    (path / "journal.jsonl").unlink()
    found = page_of(load_records(path))
    assert lead(found).startswith("Trained so far: 0 of 8 steps") and "Perplexity" not in cards(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [("held_out", [[0]]), ("held_out", [["a", 1.0]]), ("losses", [3]), ("losses", [[0, "x"]]), ("steps", None)],
)
def test_damage_is_an_error_of_one_line(tmp_path: Path, trained: Json, key: str, value: object) -> None:
    trained["training"][key] = value
    with pytest.raises(DataError, match="damaged"):
        page(tmp_path, trained)


@pytest.mark.parametrize(
    "line",
    [{"step": "saved"}, {"step": "saved", "at": "x", "seconds": 1}, {"step": "trained", "seconds": 1},
     {"evaluated": "before", "result": 3}],
)  # fmt: skip
def test_a_damaged_journal_is_an_error_of_one_line(tmp_path: Path, trained: Json, line: Json) -> None:
    path = save_training(tmp_path / "half.secateur", trained, 1)
    (path / "journal.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"journal.jsonl: .* damaged"):
        load_records(path)


@pytest.mark.parametrize(
    "former",
    [3, "x", [], {}, {"plan": {"command": ["a"]}}, {"plan": {"command": "graft"}}, {**a_training(), "training": 1},
     packed_report({"plan": 3})],
    ids=lambda former: str(former)[:30],
)  # fmt: skip
def test_what_came_with_the_model_may_be_damaged(tmp_path: Path, former: Any) -> None:
    found = page(tmp_path, a_training(former))
    assert len(found.all("pre")) == 1 and "every zero was kept" in lead(found)
    (tmp_path / "packed").mkdir()
    assert len(page(tmp_path / "packed", packed_report(a_training(former))).all("pre")) == 2
    (tmp_path / "twice").mkdir()
    assert len(page(tmp_path / "twice", a_training(a_training(former))).all("pre")) == 2


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_real_trained_model_has_a_page(tmp_path: Path, model_directory) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prune(model_directory("llama"), tmp_path / "pruned", method="magnitude")
    text = str(tmp_path / "text.txt")
    made = finetune(tmp_path / "pruned", tmp_path / "out", data=text, train="bias", steps=4, seqlen=32)
    found = Tree(report(tmp_path / "out", output=tmp_path / "r.html").read_text()).open[0]
    rows = {int(step): losses for step, *losses in table(found, "Loss, nats per token")}
    assert {step: float(loss) for step, (_, loss) in rows.items() if loss} == dict(made["training"]["held_out"])
    assert {step: float(loss) for step, (loss, _) in rows.items() if loss} == dict(made["training"]["losses"])
    kinds = table(found, "Sparsity, zeros / weights")
    assert [float(cell) for row in kinds for cell in row[1:]] == [one["sparsity"] for one in made["matrices"]]
    assert render_page(load_records(tmp_path / "out")) == (tmp_path / "r.html").read_text()

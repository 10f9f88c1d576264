"""What the card says of a shrunk model, and the command that makes it."""

import doctest
import inspect
import json
import shlex

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from report_data import HOSTILE_NAMES, a_shrinking, packed_report
from secateur.api import evaluate, pack, prune, shrink, unpack
from secateur.cli import main
from secateur.pruning.structured import CRITERIA
from secateur.reporting import removed
from secateur.reporting.commands import making_command, shrink_command
from secateur.reporting.markdown.card import CARD, model_card, refresh_card
from secateur.reporting.markdown.papers import CRITERIA_PAPERS, DEPTH_PAPERS, REAP
from secateur.shrinking import depth
from secateur.shrinking.request import ShrinkRequest
from tiny import rows


@pytest.fixture
def card(tmp_path):
    """``card(report)``: the card of a directory with that report."""

    def make(report, source=None):
        (tmp_path / "secateur.json").write_text(json.dumps(report))
        return model_card(tmp_path, source)

    return make


def metadata(card):
    return ModelCard(card).data.to_dict()


def planned(**changes):
    report = a_shrinking()
    return {**report, "plan": {**report["plan"], **changes}}


def test_a_card_says_what_went_and_how(card):
    text = card({**a_shrinking(), "plan": {**a_shrinking()["plan"], "model": {"name": "org/Tiny-1B", "digest": "d"}}})
    assert metadata(text) == {
        "base_model": "org/Tiny-1B", "library_name": "transformers", "tags": ["pruned", "secateur"],
    }  # fmt: skip
    assert "\n# Tiny-1B, shrunk by 25.0% of its blocks' parameters\n" in text
    base = "[`org/Tiny-1B`](https://huggingface.co/org/Tiny-1B)"
    assert (
        f"\nThis is {base}, with 25.0% of the parameters of its blocks removed, in one shot after training and without "
        "retraining. It has 1,152 neurons in each MLP instead of 1,536; 3 blocks instead of 4. Block 2 of the base "
        "model went. The matrices after a cut were solved anew by least squares, to make up for what went. Embeddings "
        "and output head were not cut.\n"
    ) in text
    facts = dict(line[2:-2].split(" | ", 1) for line in text.split("\n## ")[0].splitlines() if line.startswith("| "))
    assert facts["Base model"] == base
    assert facts["Criterion"].startswith("`obs`. ZipLM: Eldar Kurtic, Elias Frantar, Dan Alistarh, *[ZipLM: ")
    assert facts["Heads or neurons"] == (
        "of 2 ways to remove 25.0%, the one that changes predictions least: 1 groups of heads left and 12.5% of the "
        "neurons removed, KL 0.5 nats per token"
    )
    assert facts["Blocks removed"].startswith(
        "2: one after the other, each time the one without which predictions change least. SLEB: Jiwon Song, "
    )
    assert "REAP: Mike Lasby" in facts["Experts"]
    assert facts["Config"] == (
        "`intermediate_size` from 1,536 to 1,152; `num_hidden_layers` from 4 to 3; `head_dim` from what it did not "
        "say to 8; `layer_types` from a list of 4 to a list of 3"
    )
    assert facts["Parameters"] == "1,600; before, 2,000"
    assert facts["Parameters of blocks"] == "1,200; before, 1,600"
    assert facts["Calibration"] == "`c4`, 4 sequences, 32 tokens, seed 7"
    assert facts["Time to shrink"] == "10 s, 2 threads, cpu" and facts["Peak memory"] == "2.0 MB"
    assert facts["Size"] == "6.4 kB; before, in the same dtype, 8.0 kB"  # 6400 * 2000 / 1600
    assert "| Perplexity on | Base model | This model | Ratio | Measured |" in text
    assert "| 20.00 | 50.00 | 2.50 | when shrunk |" in text and "ense model" not in text
    assert "nothing else is needed, and every engine that runs the base model runs it." in text
    assert "secateur pack" not in text and "zeros" not in text
    assert "\nsecateur shrink org/Tiny-1B OUTPUT --layers 1 --experts 0.5 --target 0.25 --samples 4" in text


def test_what_was_not_done_is_not_said(card):
    bare = {"steps": [], "matrices": [], "kept_experts": None}
    text = card({**planned(layers=[2], calibration=None, compensate=False), **bare})
    assert "| Blocks removed | 2: named by the user |" in text and "| Calibration | none, " in text
    assert "least squares" not in text and "Criterion" not in text and "REAP" not in text and "SLEB" not in text
    kept = card(planned(compensate=False, criterion="flap", depth="influence"))
    assert "The matrices after a cut keep their other weights." in kept
    assert "`flap`. FLAP: Yongqi An, " in kept and "ShortGPT: Xin Men, " in kept


PUBLISHED = {
    "obs": ("Kurtic", "Alistarh", "2023", "2302.04089"),
    "flap": ("An", "Wang", "2024", "2312.11983"),
    "wanda-sp": ("An", "Wang", "2024", "2312.11983"),
    "magnitude": ("Li", "Graf", "2017", "1608.08710"),
    "kl": ("Song", "Kim", "2024", "2402.09025"),
    "influence": ("Men", "Chen", "2024", "2403.03853"),
    "experts": ("Lasby", "Thangarasa", "2025", "2510.13999"),
}


def test_everything_that_chooses_is_cited():
    assert {name: method.paper for name, method in CRITERIA.items() if method.paper} == {
        name: paper.link for name, paper in CRITERIA_PAPERS.items()
    }
    assert set(DEPTH_PAPERS) | {"random"} == set(depth.BY)
    papers = {**CRITERIA_PAPERS, **DEPTH_PAPERS, "experts": REAP}
    assert set(papers) == set(PUBLISHED)
    for name, (first, last, year, link) in PUBLISHED.items():
        authors = [author.split()[-1] for author in papers[name].authors.split(", ")]
        assert (authors[0], authors[-1], papers[name].link) == (first, last, f"https://arxiv.org/abs/{link}")
        assert year in papers[name].where


@pytest.mark.parametrize("text", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize("packed", [False, True])
def test_hostile_names_stay_text(card, text, packed):
    report = planned(model={"name": text, "digest": "d"}, criterion=text, depth=text, device=text)
    report["config"] = {text: [text, [text]], "layer_types": [None, text]}
    report["steps"][2]["kl"] = {text: 0.5}
    shown = card(packed_report(report, "int8") if packed else report)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(ModelCard(shown).text)
    inner = [child for token in tokens for child in token.children or []]
    assert {child.attrs["href"] for child in inner if child.type == "link_open"} == {REAP.link}
    assert {"html_inline", "image", "s_open", "strong_open"}.isdisjoint(child.type for child in inner)
    assert sum(token.type == "html_block" for token in tokens) == 2  # the marks
    assert sum(token.type == "heading_open" for token in tokens) == 5


def test_the_card_of_a_packed_one_says_both(card):
    text = card(packed_report(a_shrinking(), "int8"))
    assert "\n# tiny, shrunk by 25.0% of its blocks' parameters, packed\n" in text
    assert "It is packed: of 4 matrices only the nonzero values are stored, rounded to 8 bits." in text
    assert "\nsecateur shrink tiny SHRUNK --layers 1" in text
    assert "\nsecateur pack SHRUNK OUTPUT --values int8\n" in text
    assert "| before packing |" in text and metadata(text)["tags"] == ["pruned", "secateur"]


@pytest.mark.parametrize(
    "damage",
    [{"config": None}, {"config": {"intermediate_size": [1]}}, {"parameters": {}}, {"steps": [3]}, {"bytes": "x"},
     {"plan": {"command": "shrink"}}, {"plan": {**a_shrinking()["plan"], "threads": "<b>"}}],
    ids=str,
)  # fmt: skip
def test_a_report_that_came_with_a_packed_model_may_be_damaged(card, damage):
    damaged = {**a_shrinking(), **damage}
    text = card(packed_report(damaged, "int8"))
    if "bytes" not in damage:  # which a packed model has of its own
        assert "\n# out, packed\n" in text and "how it was pruned is not recorded here" in text
    assert "<b>" not in text


@pytest.fixture(scope="module")
def shrunk(model_directory, tmp_path_factory):
    """A real one, whose source has a card."""
    import shutil

    folder = tmp_path_factory.mktemp("shrunk")
    shutil.copytree(model_directory("llama"), folder / "source")
    (folder / "source" / CARD).write_text("---\nlicense: mit\nbase_model: org/base\n---\n# x\n")
    report = shrink(folder / "source", folder / "out", neurons=0.5, round=8, calibration=rows(6, 24))
    return folder / "out", report


def test_a_shrunk_model_comes_with_its_card(shrunk):
    out, report = shrunk
    text = (out / CARD).read_text()
    assert text == model_card(out, (out.parent / "source" / CARD).read_text())
    assert "| Config | `intermediate_size` from 48 to 24 |" in text and "license: mit" in text
    assert f"| Parameters | {report['parameters']['after']:,}; before, {report['parameters']['before']:,} |" in text
    assert "It was shrunk from Python, with what no command line can name" in text


def test_an_evaluation_comes_into_the_card(shrunk, tmp_path):
    (tmp_path / "text.txt").write_text("One good cut is worth ten that were made in a hurry. " * 40)
    found = evaluate(shrunk[0], text=str(tmp_path / "text.txt"), seqlen=16)
    text = (shrunk[0] / CARD).read_text()
    assert f"tokens | {found['perplexity']:.2f} | 20" in text  # and the rest of the date
    refresh_card(shrunk[0])
    assert (shrunk[0] / CARD).read_text() == text


def test_what_is_made_of_a_shrunk_model_has_a_sound_card(shrunk, tmp_path):
    out, _ = shrunk
    prune(out, tmp_path / "pruned", method="magnitude")
    text = (tmp_path / "pruned" / CARD).read_text()
    assert "\n# out, pruned with magnitude pruning to 50%\n" in text and "shrunk by" not in text
    assert metadata(text)["base_model"] == "org/base" and "| Base model | `out` |" in text
    pack(out, tmp_path / "packed", values="int8")
    text = (tmp_path / "packed" / CARD).read_text()
    assert "\n# source, shrunk by " in text and "rounded to 8 bits" in text
    assert metadata(text)["base_model"] == "org/base"
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    text = (tmp_path / "unpacked" / CARD).read_text()
    assert "\n# source, shrunk by " in text and "every engine" in text and "It is packed" not in text


def test_a_pruned_model_may_be_shrunk(shrunk, tmp_path):
    prune(shrunk[0].parent / "source", tmp_path / "pruned", method="magnitude")
    shrink(tmp_path / "pruned", tmp_path / "small", neurons=0.5, round=8, calibration=rows(6, 24))
    text = (tmp_path / "small" / CARD).read_text()
    assert "\n# pruned, shrunk by " in text and "| Base model | `pruned` |" in text
    assert metadata(text)["base_model"] == "org/base"


COMMANDS = [
    (dict(neurons=0.5, round=8), "--neurons 0.5 --round 8"),
    (dict(layers=[1], calibration="c4"), "--layers 1,1"),
    (dict(layers=[0, 2], calibration="c4"), "--layers 0,2"),
    (dict(layers=1, depth="influence", seed=3), "--layers 1 --depth influence --seed 3"),
    (dict(layers=2, depth="random", seed=5), "--layers 2 --depth random --seed 5"),
    (dict(target=0.3, of="neurons", round=4), "--target 0.3 --of neurons --round 4"),
    (dict(heads=0.5, propagate="block"), "--heads 0.5 --propagate block"),
    (dict(target=0.3, of=["heads", "neurons"], round=4), "--target 0.3 --round 4"),
    (dict(heads=0.5, compensate=False, criterion="flap"), "--heads 0.5 --criterion flap --no-compensate"),
    (dict(neurons=0.5, round=8, dtype="float32", evaluate="wikitext2"),
     "--neurons 0.5 --round 8 --dtype float32 --evaluate wikitext2"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), COMMANDS, ids=[words for _, words in COMMANDS])
def test_a_plan_gives_its_command_back(model_directory, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows(6, 24).tolist()))
    family = "qwen3"  # which has heads of a width of its own
    options = {"calibration": "rows.jsonl", **options}
    wanted = shrink(model_directory(family), tmp_path / "out", dry_run=True, **options)
    line = shlex.split(making_command(wanted, "out"))
    assert line[:4] == ["secateur", "shrink", str(model_directory(family)), "out"]
    texts = ["--calibration", "rows.jsonl", "--samples", "6", "--seqlen", "24"] if wanted["calibration"] else []
    pairs = [word for word in line[4:] if word not in texts]
    assert sorted(pairs) == sorted(shlex.split(words))
    assert main([*line[1:], "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in wanted if key != "evaluate"} == {
        key: value for key, value in json.loads(json.dumps(wanted)).items() if key != "evaluate"
    }
    assert (found["evaluate"] or {}).get("source") == (wanted["evaluate"] or {}).get("source")


def test_what_was_given_in_python_has_no_command():
    plan = a_shrinking()["plan"]
    assert shrink_command({**plan, "calibration": {**plan["calibration"], "source": "the given strings"}}) is None
    assert making_command(plan, "o") is not None


def test_defaults_are_those_of_shrink():
    request, options = vars(ShrinkRequest()), inspect.signature(shrink).parameters
    assert {key: options[key].default for key in request} == request


def test_examples():
    found = doctest.testmod(removed)
    assert found.attempted and not found.failed

"""What the card says of a model that was trained with sparsity, and the commands that made it."""

import doctest
import inspect
import json
import shlex

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from report_data import HOSTILE_NAMES, a_course, a_pruning, a_shrinking, a_training, packed_report, perplexity
from secateur.api import finetune, pack, prune
from secateur.cli import main
from secateur.pipeline.calibration import Tokens
from secateur.reporting import trained as words_of_training
from secateur.reporting.commands import finetune_command, making_command
from secateur.reporting.markdown.card import BEGIN, CARD, END, model_card, refresh_card
from secateur.reporting.markdown.papers import PERP, SCHEDULE_PAPERS
from secateur.training.plan import make_plan
from secateur.training.request import FinetuneRequest
from secateur.training.schedules import SCHEDULES
from tiny import TEXT, rows

# A deprecation of transformers' own.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def card(tmp_path):
    """``card(report)``: the card of a directory with that report."""

    def make(report, source=None):
        (tmp_path / "secateur.json").write_text(json.dumps(report))
        return model_card(tmp_path, source)

    return make


def changed(report, **plan):
    return {**report, "plan": {**report["plan"], **plan}}


def a_pruned_course(former=None, **options):
    """The report of a model that was pruned on the way, all of it trained."""
    report = changed(a_training(former), course=a_course(**options), train="full", rank=None)
    return {**report, "sparsity": 0.6, "sparsity_before": 0.0}


def metadata(card):
    return ModelCard(card).data.to_dict()


def facts(text):
    return dict(line[2:-2].split(" | ", 1) for line in text.split("\n## ")[0].splitlines() if line.startswith("| "))


def commands(text):
    return [line for line in text.splitlines() if line.startswith("secateur ")]


def test_a_card_says_what_was_trained_and_where_its_zeros_are_from(card):
    pruning = changed(a_pruning(), model={"name": "org/Tiny-1B", "digest": "d"})
    report = changed(a_training(pruning), model={"name": "./thin", "digest": "d"})
    text = card(report, "---\nbase_model: org/Tiny-1B\n---\n")
    assert metadata(text) == {
        "base_model": "org/Tiny-1B", "base_model_relation": "finetune", "library_name": "transformers",
        "tags": ["pruned", "sparse", "secateur", "sparsegpt"],
    }  # fmt: skip
    assert "\n# Tiny-1B, pruned with SparseGPT to 50%, trained for 6 steps\n" in text
    base = "[`org/Tiny-1B`](https://huggingface.co/org/Tiny-1B)"
    assert (
        f"\nThis is {base}, pruned with SparseGPT to 50%, then trained for 6 steps. Of the weights in its decoder's "
        "linear layers 50.0% are zero, and every zero that was there before was kept in training. Trained were LoRA "
        "adapters of rank 4 under the mask, merged in the end, to predict what comes next in `c4`. The model is that "
        "of step 6 of 8, whose loss on held-out rows was lowest.\n"
    ) in text
    found = facts(text)
    assert found["Base model"] == base
    assert found["Pruned before"].startswith(
        "50.00% of 64 weights, pattern `row`, the same sparsity in every output row. SparseGPT: Elias Frantar, "
    )
    assert found["Trained"].startswith(
        "LoRA adapters of rank 4 under the mask, merged in the end: 1,200 in all. PERP: Max Zimmer, Megi Andoni, "
    )
    assert "(https://arxiv.org/abs/2312.15230)" in found["Trained"]
    assert found["Steps"] == "6 of 8, each of 6 rows"  # 2 * 3
    assert found["Data"] == "`c4`, 18 rows and 2 held out, of 8 tokens at most; 160 tokens, seed 7"
    assert found["Learning rate"] == "0.001 at its highest" and "Teacher" not in found
    assert found["Held-out loss"] == "4.000; before, 5.000: nats per token, 2 rows"
    assert found["Sparsity"] == "50.00%; before, 50.00%: 32 of 64 weights are zero; every zero was kept"
    assert found["Time to train"] == "20 s, 2 threads, cpu" and found["Peak memory"] == "2.0 MB"
    assert found["Size"] == "750 B; dense in 16 bits, 1.0 kB"
    assert commands(text) == [
        "secateur prune org/Tiny-1B PRUNED --method sparsegpt --pattern row --samples 4 --seed 7 --exclude 'lm head' "
        "--evaluate wikitext2",
        "secateur finetune PRUNED OUTPUT --data c4 --steps 8 --accumulate 3 --rank 4 --seed 7 --evaluate wikitext2",
    ]
    assert "secateur pack" in text and "in one shot" not in text


def test_before_is_the_model_before_training_and_dense_what_was_pruned(card):
    text = card(a_training())
    assert "| Perplexity on | Before training | This model | Ratio to before | Measured |" in text
    assert "| 50.00 | 30.00 | 0.60 | when trained |" in text and "ense model" not in text
    assert "Pruning costs quality; training wins back some of it" in text
    text = card(a_training(a_pruning()))  # of which 20.00 is known on the same tokens
    assert "| Dense model | Before training | This model | Ratio | Ratio to before | Measured |" in text
    assert "| 20.00 | 50.00 | 30.00 | 1.50 | 0.60 | when trained |" in text
    other = {**a_pruning(), "evaluation": {"before": perplexity(3.0, 20.0, "sotu"), "after": perplexity(3.0, 20.0)}}
    assert "20.00" not in card(a_training(other))
    assert "How much was not measured on this model" in card({**a_training(), "evaluation": None})


def test_what_is_measured_later_is_compared_with_both(card, tmp_path):
    line = {"schema": 1, "date": "2026-11-22T13:00:00+00:00", **perplexity(3.5, 25.0)}
    line["against"] = {"model": "tiny", "perplexity": 10.0}
    text = card(a_training(a_pruning()))  # whose dense model had another perplexity
    (tmp_path / CARD).write_text(text)
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    refresh_card(tmp_path)
    now = (tmp_path / CARD).read_text()
    assert "| 10.00 | 50.00 | 25.00 | 2.50 | 0.50 | 2026-11-22 |" in now
    assert now.split(BEGIN)[0] == text.split(BEGIN)[0] and now.split(END)[1] == text.split(END)[1]


def test_a_model_pruned_on_the_way(card):
    text = card(a_pruned_course())
    assert "\n# thin, pruned with Wanda to 60% in 6 steps of training\n" in text
    assert "Of the weights in its decoder's linear layers 60.0% are zero. Trained were all parameters" in text
    found = facts(text)
    assert found["Pruned on the way"].startswith(
        "gradually from 25.0%, with a new mask every 2 steps, schedule cubic. Gradual pruning: Michael Zhu, Suyog Gupta"
    )
    assert found["Method"].startswith("Wanda: ") and found["Pattern"].startswith("`row`, the same sparsity")
    assert found["Sparsity"] == "60.00%; before, 0.00%: 32 of 64 weights are zero"
    assert found["Trained"] == "all parameters: 1,200 in all" and metadata(text)["tags"][-1] == "wanda"
    assert "not recorded" not in text.split("\n## ")[0] and "every zero" not in text
    line = "secateur finetune thin OUTPUT --data c4 --steps 8 --accumulate 3 --learning-rate 0.001 --sparsity 0.6 "
    line += "--initial 0.25 --every 2 --seed 7 --evaluate wikitext2"
    assert commands(text) == [line]
    text = card(a_pruned_course(rounds=3, samples=5, pattern="2:4", method="magnitude", allocation={"0": 0.25}))
    assert facts(text)["Pruned on the way"].startswith("in 3 rounds. Iterative pruning: Song Han, ")
    assert facts(text)["Pattern"] == "`2:4`" and "without its retraining" not in text
    assert "allocation.yaml:\n\n```yaml\n'0': 0.25\n```" in text
    narrowed = card(a_pruned_course(include=["mlp"]))
    assert "in those of its linear layers that were selected 60.0% are zero" in narrowed


def test_a_teacher_and_what_was_trained_are_named(card):
    text = card(changed(a_training(), teacher={"name": "/home/me/dense", "digest": "d"}, train="bias", rank=None))
    assert "Trained were biases and norms, to predict as `dense` does in `c4`." in text
    assert facts(text)["Teacher"] == "`dense`" and "PERP" in facts(text)["Trained"]
    report = changed(a_training(), teacher={"name": "dense", "digest": "d"}, train="full", rank=None)
    report["training"] = {**report["training"], "loss": "divergence"}
    text = card(report)
    assert "divergence from the teacher" in facts(text)["Held-out loss"] and "PERP" not in text
    assert "How it was pruned is not recorded here." in text


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"stopped": 7}, "The loss became NaN or infinite in step 7; the model is that of step 6 of 8."),
        ({"held_out": [[0, 4.0], [6, 4.0]]},
         "Training did not lower the loss on held-out rows: 4.000 before, 4.000 now."),
        ({"held_out": [[0, 4.0], [6, float("nan")]]}, "on held-out rows: 4.000 before, no number now."),
        ({"held_out": [], "held_out_rows": 0}, "nothing tells whether training did harm."),
    ],
)  # fmt: skip
def test_what_went_wrong_is_said(card, training, said):
    report = a_training()
    assert said not in card(report)
    report["training"] |= training
    assert said in card(report)
    course = a_pruned_course()  # in which the loss rises as a rule
    course["training"] |= training
    assert ("did not lower" in card(course)) is False


def test_the_card_of_a_packed_one_says_both(card):
    text = card(packed_report(a_training(a_pruning()), "int8"))
    assert "\n# tiny, pruned with SparseGPT to 50%, trained for 6 steps, packed\n" in text
    assert "then trained for 6 steps" in text and "rounded to 8 bits." in text
    found = facts(text)
    assert found["Held-out loss"].startswith("4.000; before, 5.000") and found["Packed"].startswith("as `bitmask`, ")
    assert "| 20.00 | 50.00 | 30.00 | 1.50 | 0.60 | before packing |" in text
    assert [line.split(" --")[0] for line in commands(text)] == [
        "secateur prune tiny PRUNED", "secateur finetune PRUNED TRAINED", "secateur pack TRAINED OUTPUT",
    ]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), [("int8", "rounded to 8 bits"), (None, "bit for bit as they were")])
def test_what_is_trained_packed_is_packed_again(card, values, said):
    packed = packed_report(a_pruning(), values)
    text = card({**a_training(packed), "packed": packed["packed"]})
    assert f"It is packed: of 4 matrices only the nonzero values are stored, {said}." in text
    assert facts(text)["Packed"].startswith("4 packed: 0.5781 of their dense bytes") and "import secateur" in text
    assert [line.split(" --")[0] for line in commands(text)] == [
        "secateur prune tiny PRUNED", "secateur pack PRUNED PACKED", "secateur finetune PACKED OUTPUT",
    ]  # fmt: skip


def test_a_long_way_is_told_step_by_step(card):
    text = card(a_training(a_training(a_pruned_course(a_shrinking()))))
    assert (
        "# tiny, shrunk by 25.0% of its blocks' parameters, pruned with Wanda to 60% in 6 steps of training, trained "
        "for 6 steps, trained for 6 steps\n"
    ) in text
    assert facts(text)["Shrunk before"] == "25.0% of its blocks' parameters were removed"
    assert "| Base model | Before training | This model |" in text  # the whole model is not the only dense one
    assert [line.split(" --")[0] for line in commands(text)] == [
        "secateur shrink tiny SHRUNK", "secateur finetune SHRUNK TRAINED", "secateur finetune TRAINED TRAINED-2",
        "secateur finetune TRAINED-2 OUTPUT",
    ]  # fmt: skip


DAMAGED = [
    3, "x", [], {"plan": 3}, {"plan": {}}, {"plan": {"command": "finetune"}}, {"plan": {"command": ["a"]}},
    {"plan": {"command": "graft", "model": {"name": "x"}}}, {**a_pruning(), "sparsity": "<b>"},
    {**a_pruning(), "plan": {"method": "wanda"}}, {**a_shrinking(), "parameters": None},
    {**a_training(), "training": {}}, {**a_training(), "former": {"plan": 3}}, packed_report({"plan": 7}),
]  # fmt: skip


@pytest.mark.parametrize("former", DAMAGED, ids=lambda former: str(former)[:40])
@pytest.mark.parametrize("packed", [False, True])
def test_what_came_with_the_model_may_be_damaged(card, former, packed):
    report = a_training(former)
    text = card(packed_report(report) if packed else report)
    assert "trained for 6 steps" in text.split("\n\n")[1] and "# thin, " in text and "<b>" not in text
    target = "TRAINED" if packed else "OUTPUT"
    assert commands(text)[0].startswith(f"secateur finetune thin {target} --data c4")


def test_a_packed_model_whose_training_is_damaged_is_packed_all_the_same(card):
    text = card(packed_report({**a_training(), "training": None}))
    assert "\n# out, packed\n" in text and "how it was pruned is not recorded here" in text


@pytest.mark.parametrize("text", HOSTILE_NAMES, ids=repr)
@pytest.mark.parametrize("course", [False, True])
def test_hostile_names_stay_text(card, text, course):
    former = changed(a_pruning(), model={"name": text, "digest": "d"}, pattern=text, method=text)
    report = changed(a_training(former), model={"name": text, "digest": "d"}, device=text, train=text)
    report["plan"] |= {"teacher": {"name": text}, "data": {**report["plan"]["data"], "source": text}}
    if course:
        report["plan"]["course"] = a_course(method=text, schedule=text, pattern=text, allocation={text: 0.5})
    shown = card(packed_report(report, "int8") if course else report)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(ModelCard(shown).text)
    inner = [child for token in tokens for child in token.children or []]
    assert not [child for child in inner if child.type == "link_open"]
    assert {"html_inline", "image", "s_open", "strong_open"}.isdisjoint(child.type for child in inner)
    assert sum(token.type == "html_block" for token in tokens) == 2  # the marks
    assert sum(token.type == "heading_open" for token in tokens) == 5


def test_the_papers_are_those_of_the_code():
    from secateur.training import gradual, lora, rounds

    assert PERP.link in lora.__doc__
    assert set(SCHEDULE_PAPERS) == {*SCHEDULES, "rounds"} - {"linear"}
    assert SCHEDULE_PAPERS["cubic"].link in gradual.__doc__ and SCHEDULE_PAPERS["rounds"].link in rounds.__doc__
    assert SCHEDULE_PAPERS["one-cycle"].link in SCHEDULES["one-cycle"].__doc__


@pytest.fixture(scope="module")
def trained(model_directory, tmp_path_factory):
    """A real one of a pruned model, and what it was made of."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT * 20)
    prune(model_directory("llama"), folder / "pruned", method="magnitude")
    options = dict(data=str(folder / "text.txt"), train="full", steps=4, seqlen=32)
    return folder, finetune(folder / "pruned", folder / "out", **options)


def test_a_trained_model_comes_with_its_card(trained, tmp_path):
    folder, report = trained
    text = (folder / "out" / CARD).read_text()
    assert (
        text == model_card(folder / "out", None) and "# llama-float32, pruned with magnitude pruning to 50%, " in text
    )
    found, training = facts(text), report["training"]
    before, after = training["held_out"][0][1], dict(map(tuple, training["held_out"]))[training["steps"]]
    assert found["Held-out loss"].startswith(f"{after:.3f}; before, {before:.3f}")
    assert found["Trained"] == f"all parameters: {training['trainable']:,} in all"
    assert "without its retraining" not in text and len(commands(text)) == 2
    pack(folder / "out", tmp_path / "packed")
    assert facts((tmp_path / "packed" / CARD).read_text())["Held-out loss"] == found["Held-out loss"]


COMMANDS = [
    (dict(), ""),
    (dict(train="lora", learning_rate=1e-3, rank=16, eval_steps=40), ""),  # all by default
    (dict(train="bias", steps=25, batch_size=1, accumulate=4), "--train bias --steps 25 --batch-size 1 --accumulate 4"),
    (dict(train="full", learning_rate=1e-3, eval_steps=7), "--train full --learning-rate 0.001 --eval-steps 7"),
    (dict(rank=4, seed=3, gradient_checkpointing=True), "--rank 4 --gradient-checkpointing --seed 3"),
    (dict(teacher="a teacher", evaluate="wikitext2"), "--teacher 'a teacher' --evaluate wikitext2"),
    (dict(evaluate="sotu", seqlen=16), "--seqlen 16 --evaluate sotu"),
    (dict(sparsity=0.6), "--sparsity 0.6"),
    (dict(sparsity=0.6, train="full", method="wanda", every=10), "--sparsity 0.6"),
    (dict(sparsity=0.6, train="bias", method="ria", initial=0.2, schedule="linear", every=5, include=["a", "b c"]),
     "--train bias --sparsity 0.6 --initial 0.2 --schedule linear --every 5 --method ria --include a --include 'b c'"),
    (dict(pattern="2:4", exclude="d"), "--pattern 2:4 --exclude d"),
    (dict(rounds=3), "--rounds 3"),
    (dict(rounds=3, method="sparsegpt:damping=0.02", samples=9, allocation={"0": 0.25}),
     "--rounds 3 --method sparsegpt:damping=0.02 --allocation allocation.yaml --samples 9"),
]  # fmt: skip


def a_plan(request, monkeypatch):
    """The plan of a request, with rows of 24 tokens and a teacher that need not be there."""
    from secateur.training import plan as module

    class Teacher:
        class checkpoint:
            directory = None

    monkeypatch.setattr(module, "source_digest", lambda *_: "d")
    tokens = Tokens(list(rows(3, 24)), "c4", 72)
    return make_plan(request, {"name": "m", "digest": "d"}, tokens, Teacher() if request.teacher else None, "cpu")


@pytest.mark.parametrize(("options", "words"), COMMANDS, ids=[words or str(options) for options, words in COMMANDS])
def test_a_plan_gives_its_command_back(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "allocation.yaml").write_text('"0": 0.25\n')
    wanted = a_plan(FinetuneRequest(data="c4", **options), monkeypatch)
    line = shlex.split(making_command(wanted, "out"))
    assert line[:6] == ["secateur", "finetune", "m", "out", "--data", "c4"]
    rows_say = [] if options.get("evaluate") else ["--seqlen", "24"]
    assert sorted(line[6:]) == sorted([*rows_say, *shlex.split(words)])

    given = {}
    monkeypatch.setattr("secateur.api.finetune", lambda model, output, data, **more: given.update(more) or {"a": 1})
    assert main([*line[1:], "--json"]) == 0
    fields = vars(FinetuneRequest(data=None)).keys() & given.keys()
    read = FinetuneRequest(data="c4", **{key: given[key] for key in fields})
    read.check()
    if read.allocation != "uniform":  # a file of rules, as the plan shows them
        read = FinetuneRequest(**{**vars(read), "allocation": {"0": 0.25}})
    found = a_plan(read, monkeypatch)
    assert {**found, "evaluate": None} == {**wanted, "evaluate": None}
    assert (found["evaluate"] or {}) == (wanted["evaluate"] or {})


def test_rows_of_the_usual_length_need_no_option():
    plan = a_training()["plan"]
    assert "--seqlen" not in finetune_command({**plan, "evaluate": None, "data": {**plan["data"], "seqlen": 512}})
    evaluated = {**plan, "evaluate": {"source": "c4", "seqlen": 512}, "data": {**plan["data"], "seqlen": 512}}
    assert "--seqlen" in finetune_command(evaluated)  # without it, perplexity would be measured on longer ones


@pytest.mark.parametrize(
    "changes",
    [{"data": {**a_training()["plan"]["data"], "source": "the given strings"}}, {"train": "mine"},
     {"course": a_course(method="mine")}],
)  # fmt: skip
def test_what_only_python_can_give_has_no_command(changes, card):
    assert finetune_command({**a_training()["plan"], **changes}) is None
    text = card(changed(a_training(a_pruning()), **changes))
    assert "It was trained from Python, with what no command line can name" in text
    assert len(commands(text)) == 1


def test_defaults_are_those_of_finetune():
    request, options = vars(FinetuneRequest(data=None)), inspect.signature(finetune).parameters
    assert {key: options[key].default for key in request if key != "data"} == {
        key: value for key, value in request.items() if key != "data"
    }


def test_examples():
    found = doctest.testmod(words_of_training)
    assert found.attempted and not found.failed

"""The sparsity that costs no more than is allowed: found by bisection, recorded, not sought twice."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.api import searching
from secateur.errors import OptionError, OutputError
from secateur.evaluation import search, subject
from tiny import TEXT

pytestmark = pytest.mark.usefixtures("no_timing")


@pytest.fixture
def text(long_text):
    return long_text


@pytest.fixture(scope="module")
def model(model_directory, tokenizer, tmp_path_factory):
    """A tiny llama that has learned the text, so that pruning costs something."""
    directory = model_directory("llama")
    llama = AutoModelForCausalLM.from_pretrained(directory)
    rows = torch.tensor(tokenizer(TEXT * 5)["input_ids"][: 16 * 32]).view(32, 16)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for _ in range(60):
        llama(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    out = tmp_path_factory.mktemp("trained") / "model"
    llama.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def prune(model, text, tmp_path):
    def run(output="out", **options):
        chosen = {"method": "magnitude", "seqlen": 16, "evaluate": text, **options}
        return secateur.prune(model, tmp_path / output, **chosen)

    return run


@pytest.fixture
def pruned(monkeypatch):
    """How often a model was pruned in the search."""
    counted = []
    function = subject.prune_checkpoint

    def counting(*args, **options):
        counted.append(args)
        return function(*args, **options)

    monkeypatch.setattr(subject, "prune_checkpoint", counting)
    return counted


def rise(model, text, tmp_path, sparsity):
    out = tmp_path / f"at-{sparsity}"
    secateur.prune(model, out, method="magnitude", sparsity=sparsity)
    windows = {"text": text, "seqlen": 16, "windows": 40}
    return secateur.evaluate(out, **windows)["loss"] - secateur.evaluate(model, **windows)["loss"]


def test_one_hundredth_more_would_cost_too_much(prune, model, text, tmp_path):
    allowed = rise(model, text, tmp_path, 0.4) + 1e-6
    result = prune(max_loss=allowed)
    found = result.report["plan"]["search"]
    assert found["sparsity"] == result.report["plan"]["sparsity"] >= 0.1
    assert found["loss_increase"] <= allowed and found["loss_increase_stderr"] > 0
    (beyond,) = (step for step in found["tried"] if step["sparsity"] == pytest.approx(found["sparsity"] + 0.01))
    assert beyond["loss_increase"] > allowed
    evaluation = result.report["evaluation"]
    assert evaluation["after"]["loss"] - evaluation["before"]["loss"] == pytest.approx(found["loss_increase"])
    assert (found["max_loss"], found["evaluate"], found["windows"]) == (allowed, text, evaluation["after"]["windows"])
    assert not (tmp_path / "out.search").exists()


def test_a_generous_allowance_ends_at_the_most_that_is_tried(prune):
    result = prune(max_loss=1e6)
    assert result.report["plan"]["sparsity"] == search.HUNDREDTHS / 100
    assert len(result.report["plan"]["search"]["tried"]) <= 7


def test_too_little_is_refused_with_what_it_would_take(prune, tmp_path, monkeypatch):
    monkeypatch.setattr(
        search, "make_row", lambda *args: {"loss_increase": 0.5, "loss_increase_stderr": 0.1, "evaluation": {}}
    )
    with pytest.raises(
        OptionError, match=r"max_loss 0\.01: removing 1 % of the weights raises the loss by 0\.5000 nats"
    ):
        prune(max_loss=0.01)
    assert not (tmp_path / "out").exists()


def test_what_was_tried_is_not_tried_again(prune, pruned, monkeypatch, tmp_path):
    options = {"max_loss": 0.05}
    whole = prune("whole", **options)
    steps = len(whole.report["plan"]["search"]["tried"])
    assert len(pruned) == steps
    prune("whole", **options)  # finished: nothing is sought
    assert len(pruned) == steps
    function = searching.largest_sparsity

    def stopped(*args):
        function(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "largest_sparsity", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(**options)
    assert len(pruned) == 2 * steps and (tmp_path / "out.search").exists()
    monkeypatch.setattr(searching, "largest_sparsity", function)
    again = prune(**options)
    assert len(pruned) == 2 * steps
    assert again.report["plan"]["search"] == whole.report["plan"]["search"]


def test_another_allowance_for_a_finished_output_is_refused(prune):
    prune(max_loss=0.05)
    with pytest.raises(OutputError, match="sparsity"):
        prune(max_loss=1e6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_loss": 0.0}, "above 0"),
        ({"max_loss": float("nan")}, "above 0"),
        ({"max_loss": 0.1, "sparsity": 0.5}, "leave out --sparsity"),
        ({"max_loss": 0.1, "reconstruct": True}, "leave out --reconstruct"),
        ({"max_loss": 0.1, "pattern": "2:4"}, "N:M"),
        ({"max_loss": 0.1, "allocation": {"0": 0.5}}, "--allocation"),
        ({"max_loss": 0.1, "dry_run": True}, "--dry-run"),
        ({"max_loss": 0.1, "method": "wanda", "calibration": ["a text"]}, "by name"),
        ({"max_loss": 0.1, "method": "wnada"}, "did you mean wanda"),
    ],
)
def test_options_between_which_nothing_is_left_to_seek(prune, options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        prune(**options)
    assert not list(tmp_path.glob("out*"))


def test_an_occupied_output_is_refused_before_the_search(prune, tmp_path, pruned):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        prune(max_loss=0.1)
    assert not pruned


def test_narrowed_searches_prune_what_is_left(prune, text):
    report = prune(max_loss=0.05, method="wanda", calibration=text, samples=3, include="mlp", threads=1).report
    assert report["plan"]["search"]["sparsity"] == report["plan"]["sparsity"]
    assert all("mlp" in matrix["name"] for matrix in report["matrices"])
    after, before = (report["evaluation"][when]["loss"] for when in ("after", "before"))
    assert after - before == pytest.approx(report["plan"]["search"]["loss_increase"], abs=1e-6)
    assert json.dumps(report["plan"]["search"])

"""Distances between two models against their logits and hidden states as transformers itself gives them."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import DataError, OptionError
from secateur.evaluation.generation import NEW_TOKENS, PROMPT_TOKENS, repetition
from tiny import TEXT, save_tiny, tiny_tokenizer

WINDOW = 24


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 3)
    return str(path)


@pytest.fixture(scope="module")
def pair(model_directory, tmp_path_factory):
    """A dense model and what magnitude pruning leaves of it."""
    dense = model_directory("llama")
    pruned = tmp_path_factory.mktemp("pruned") / "out"
    secateur.prune(dense, pruned, method="magnitude", sparsity=0.7)
    return dense, pruned


def whole(directory, windows):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        out = model(input_ids=windows, output_hidden_states=True)
    return torch.log_softmax(out.logits[:, :-1], -1), out.hidden_states


def test_divergence_and_agreement_are_those_of_the_whole_models(pair, text, tokenizer):
    dense, pruned = pair
    found = secateur.evaluate(pruned, text=text, seqlen=WINDOW, windows=5, against=dense)
    windows = torch.tensor(tokenizer(TEXT * 3)["input_ids"][: 5 * WINDOW]).view(5, WINDOW)
    p, hidden = whole(dense, windows)
    q, others = whole(pruned, windows)
    assert found["fidelity"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["fidelity"]["kl"] > 0.01
    assert found["fidelity"]["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    true = windows[:, 1:, None]
    increases = (p.gather(-1, true) - q.gather(-1, true)).mean((1, 2))
    assert found["fidelity"]["loss_increase_stderr"] == pytest.approx(float(increases.std() / 5**0.5), rel=1e-3)
    assert found["loss"] - found["against"]["loss"] == pytest.approx(float(increases.mean()), rel=1e-3)
    expected = [float((a - b).norm() / a.norm()) for a, b in zip(hidden[1:-1], others[1:-1], strict=True)]
    assert found["fidelity"]["blocks"][:-1] == pytest.approx(expected, rel=1e-4)  # the last is normed in transformers
    assert len(found["fidelity"]["blocks"]) == len(expected) + 1
    alone = secateur.evaluate(dense, text=text, seqlen=WINDOW, windows=5)
    assert found["against"] == {"model": str(dense), **alone}


def test_distance_is_measured_on_the_first_micro_batch_and_divergence_on_all(pair, text, monkeypatch):
    dense, pruned = pair
    every = secateur.evaluate(pruned, text=text, seqlen=WINDOW, windows=4, against=dense)["fidelity"]
    first = secateur.evaluate(pruned, text=text, seqlen=WINDOW, windows=2, against=dense)["fidelity"]
    monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", 2 * WINDOW)
    split = secateur.evaluate(pruned, text=text, seqlen=WINDOW, windows=4, against=dense)["fidelity"]
    assert split["blocks"] == pytest.approx(first["blocks"], rel=1e-4)
    assert (split["kl"], split["top1"]) == pytest.approx((every["kl"], every["top1"]), rel=1e-4)


def test_a_model_is_no_distance_from_itself(pair, text):
    found = secateur.evaluate(pair[0], text=text, seqlen=WINDOW, windows=2, against=pair[0])["fidelity"]
    assert found["top1"] == 1 and abs(found["kl"]) < 1e-6 and found["blocks"] == pytest.approx([0.0] * 3, abs=1e-6)


def test_models_that_cannot_be_compared(pair, text, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", tokenizer=tiny_tokenizer(), vocab_size=640)
    with pytest.raises(DataError, match=r"vocabularies differ: \d+ and 640"):
        secateur.evaluate(pair[1], text=text, seqlen=WINDOW, windows=2, against=other)


def test_a_live_model_has_perplexity_only(pair, text):
    live = AutoModelForCausalLM.from_pretrained(pair[0])
    for option in ({"against": pair[0]}, {"generations": 1}, {"tasks": ("piqa",)}):
        with pytest.raises(OptionError, match="live model"):
            secateur.evaluate(live, text=text, seqlen=WINDOW, **option)


def test_generations_are_the_likeliest_tokens(pair, text, tokenizer):
    dense, pruned = pair
    found = secateur.evaluate(pruned, text=text, seqlen=WINDOW, windows=5, generations=2, against=dense)
    ids = tokenizer(TEXT * 3)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(pruned)
    for place, window in enumerate((0, 2)):
        prompt = ids[window * WINDOW : (window + 1) * WINDOW][:PROMPT_TOKENS]
        row = list(prompt)
        while len(row) < min(len(prompt) + NEW_TOKENS, 64):  # the model's context
            with torch.no_grad():
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == tokenizer.eos_token_id:
                break
        mine = found["generations"][place]
        assert mine["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)
        assert mine["continuation"] == tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
        assert mine["repetition"] == pytest.approx(repetition(row[len(prompt) :]))
    assert len(found["against"]["generations"]) == 2
    with pytest.raises(OptionError, match=r"generations 9: .* has 5 windows"):
        secateur.evaluate(pruned, text=text, seqlen=WINDOW, windows=5, generations=9)
    with pytest.raises(OptionError, match="generations -1"):
        secateur.evaluate(pruned, text=text, generations=-1)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([], 0.0), ([1, 2, 3], 0.0), ([1, 2, 3, 4], 0.0), ([7] * 8, 0.8), ([1, 2, 3, 4, 5, 1, 2, 3, 4], 1 / 6)],
)
def test_repetition(ids, expected):
    assert repetition(ids) == pytest.approx(expected)


def test_impossible_divergence_is_not_invented():
    from secateur.evaluation.fidelity import Fidelity

    class Dense:
        class tokens:
            digest = "d"
            seqlen = 16

    class Tokens:
        digest = "d"
        seqlen = 16
        source = "t"

    fidelity = Fidelity(Dense, Tokens)
    fidelity.add(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    assert fidelity.result()["kl"] is None and fidelity.result()["loss_increase_stderr"] is None
    fidelity = Fidelity(Dense, Tokens)
    fidelity.add(torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    assert fidelity.result()["kl"] == pytest.approx(math.log(2))
    Tokens.digest = "other"
    with pytest.raises(DataError, match="different tokens"):
        Fidelity(Dense, Tokens)


def test_with_a_block_less_no_block_stands_for_another(pair, text, tmp_path):
    from secateur.progress import Silent

    secateur.shrink(pair[0], tmp_path / "small", layers=[2], progress=Silent())
    found = secateur.evaluate(tmp_path / "small", text=text, seqlen=WINDOW, windows=2, against=pair[0])["fidelity"]
    assert found["blocks"] == [None, None] and found["kl"] > 0

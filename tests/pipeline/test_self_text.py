"""Calibration text that the model writes: the tokens of a plain sampling loop, the same for the same seed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from families import FAMILIES as EVERY
from secateur.errors import DataError, NumericsError, OptionError
from secateur.models.checkpoint import Checkpoint
from secateur.models.disk_host import DiskHost
from secateur.models.live_host import LiveHost
from secateur.pipeline import self_text
from secateur.pipeline.calibration import evaluation_windows
from secateur.pipeline.self_text import draw, self_generated
from secateur.progress import Silent
from tiny import Interrupts, same_bytes, save_tiny, tensors_of, tiny_model

SMALL = {"samples": 3, "seqlen": 12}
SELF = {"calibration": "self", **SMALL}


def written(directory, samples=3, seqlen=12, seed=0, progress=None):
    host = DiskHost(Checkpoint.open(directory), torch.device("cpu"))
    return self_generated(host, samples, seqlen, seed, progress or Silent())


def plain(directory, samples, seqlen, seed, bos=1):
    """One row and one token at a time, the whole prefix read again for each."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    numbers = torch.rand(samples, seqlen, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = []
    for row in numbers.tolist():
        ids = [int(row[0] * model.config.vocab_size) if bos is None else bos]
        for number in row[1:]:
            with torch.no_grad():
                chances = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1).tolist()
            token, passed = 0, chances[0]
            while passed <= number:
                token += 1
                passed += chances[token]
            ids.append(token)
        found.append(ids)
    return found


def as_lists(tokens):
    return [row.tolist() for row in tokens.rows]


# What is written.


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("mistral", {}),  # a sliding window of 8
        ("gpt2", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("openai-gpt", EVERY["openai-gpt"]),  # has no cache
        ("minimax", EVERY["minimax"]),  # has one with which it predicts something else
    ],
)
def test_rows_are_those_of_a_plain_loop(family, changes, tmp_path):
    bos = {"bos_token_id": 1}
    model = save_tiny(tmp_path / "model", family, "bfloat16", **{**changes, **bos})
    tokens = written(model, seed=4)
    assert as_lists(tokens) == plain(model, 3, 12, 4)
    assert len({tuple(row) for row in as_lists(tokens)}) == 3
    assert (tokens.source, tokens.available, tokens.tokens, tokens.seqlen) == ("self", 36, 36, 12)


@pytest.mark.parametrize(("family", "caches"), [("llama", True), ("openai-gpt", False), ("minimax", False)])
def test_a_cache_is_used_where_it_is_sound(family, caches, messages, monkeypatch):
    lengths = []
    model = tiny_model(family, **EVERY.get(family, {}))
    reads = type(model).forward

    def counting(self, *args, **options):
        lengths.append(options["input_ids"].shape[1])
        return reads(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    self_generated(LiveHost(model), 2, 30, 0, Silent())
    assert lengths[-3:] == ([1, 1, 1] if caches else [27, 28, 29])
    assert any("without a cache" in said for said in messages) != caches


def test_a_model_without_a_first_token_begins_with_any(tmp_path):
    model = save_tiny(tmp_path / "model", "llama", bos_token_id=None)
    tokens = written(model, samples=4)
    assert as_lists(tokens) == plain(model, 4, 12, 0, bos=None)
    assert len({row[0] for row in as_lists(tokens)}) > 1


def test_an_end_of_text_is_no_end_of_a_row(tmp_path):
    model = save_tiny(tmp_path / "model", "llama", initializer_range=0.02, vocab_size=8)
    rows = written(model, samples=8, seqlen=32).rows
    assert all(len(row) == 32 for row in rows) and any(2 in row[1:-1] for row in rows)


def test_rows_written_together_are_those_written_apart(model, monkeypatch):
    together = written(model, samples=5)
    monkeypatch.setattr(self_text, "CACHED_TOKENS", 24)
    assert as_lists(written(model, samples=5)) == as_lists(together)


def test_another_seed_is_another_text(model):
    assert written(model).digest == written(model).digest != written(model, seed=1).digest


def test_numbers_become_tokens():
    logits = torch.tensor([[1.0, 3.0, 0.0, 4.0]]).log().repeat(5, 1)  # sums 1/8, 4/8, 4/8, 1
    numbers = torch.tensor([0.0, 0.12, 0.13, 0.51, 0.9999], dtype=torch.float64)
    assert draw(logits, numbers).tolist() == [0, 0, 1, 3, 3]
    impossible = torch.tensor([[0.0, 1.0, 1.0]]).log()
    assert draw(impossible, torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    with pytest.raises(NumericsError, match="NaN"):
        draw(torch.tensor([[0.0, float("nan")]]), torch.tensor([0.5], dtype=torch.float64))


def test_progress_counts_tokens(model):
    class Counts(Silent):
        total = done = 0

        def start(self, task, total, done=0):
            self.total = total

        def advance(self, done=1, note=None):
            self.done += done

    progress = Counts()
    written(model, samples=5, seqlen=9, progress=progress)
    assert (progress.total, progress.done) == (45, 45)


# What is pruned with it.


def test_the_plan_tells_what_was_written(model, out):
    report = secateur.prune(model, out, **SELF, seed=3).report
    tokens = written(model, seed=3)
    calibration = {"source": "self", "samples": 3, "seqlen": 12, "tokens": 36, "seed": 3, "digest": tokens.digest}
    assert report["plan"]["calibration"] == calibration
    assert {row["tokens"] for row in report["matrices"]} == {36}
    secateur.prune(model, out.with_name("given"), calibration=tokens.rows)
    assert same_bytes(tensors_of(out), tensors_of(out.with_name("given")))


def test_samples_and_seqlen_by_default(model, out):
    calibration = secateur.prune(model, out, calibration="self").report["plan"]["calibration"]
    assert (calibration["samples"], calibration["seqlen"]) == (128, 64)  # all of the context


def test_a_model_in_memory_writes_the_same_and_leaves_as_it_came(model, out):
    live = AutoModelForCausalLM.from_pretrained(model, dtype="auto").train()
    dtypes = {name: tensor.dtype for name, tensor in live.state_dict().items()}
    report = secateur.prune(live, **SELF).report
    assert report["plan"]["calibration"]["digest"] == written(model).digest
    assert {name: tensor.dtype for name, tensor in live.state_dict().items()} == dtypes
    assert live.training and torch.bfloat16 in dtypes.values()
    secateur.prune(model, out, **SELF)
    mine = live.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in tensors_of(out).items())


def test_a_resumed_run_writes_the_same(model, out):
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out, **SELF, progress=Interrupts(4))
    assert out.with_name("out.secateur").exists()
    secateur.prune(model, out, **SELF)
    secateur.prune(model, out.with_name("whole"), **SELF)
    assert same_bytes(tensors_of(out), tensors_of(out.with_name("whole")))


def test_interrupted_while_writing_nothing_is_left(model, out):
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(model, out, **SELF, progress=Interrupts(3, "writing calibration text"))
    assert list(out.parent.iterdir()) == []


def test_a_packed_model_without_a_tokenizer(model_directory, out):
    secateur.prune(model_directory("gpt2"), out, method="magnitude", format="bitmask", exclude="c_attn")
    report = secateur.prune(out, out.with_name("again"), **SELF).report
    assert report["plan"]["calibration"]["source"] == "self"


def test_compare_writes_once(model, out, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("The gardener cuts what the tree can spare. " * 20)
    calls = []
    monkeypatch.setattr(self_text, "self_generated", lambda *args: calls.append(args) or self_generated(*args))
    found = secateur.compare(
        model, methods=["wanda", "ria"], calibration="self", samples=3, seqlen=12, text=str(tmp_path / "text.txt"),
        windows=2, output=out,
    )  # fmt: skip
    assert len(calls) == 1
    assert [row["calibration"] and row["calibration"]["source"] for row in found["rows"]] == [None, "self", "self"]


# What goes wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seqlen": 65}, "longer than the model's context of 64 tokens"),
        ({"seqlen": 1}, "at least 2 tokens"),
        ({"samples": 0}, "samples 0"),
        ({"seed": 2**64}, "no 64-bit number"),
    ],
)
def test_numbers_that_cannot_be(model, out, options, message):
    with pytest.raises(OptionError, match=message):
        secateur.prune(model, out, **{**SELF, **options})
    assert list(out.parent.iterdir()) == []


def test_a_model_is_not_measured_on_its_own_text(model, out, tokenizer):
    for measure in (
        lambda: secateur.evaluate(model, text="self", seqlen=12),
        lambda: secateur.prune(model, out, **SELF, evaluate="self"),
        lambda: evaluation_windows("self", tokenizer, None, 12, None),
    ):
        with pytest.raises(DataError, match=r"^self: what a model writes itself is for calibration"):
            measure()
    assert list(out.parent.iterdir()) == []

"""Block reconstruction: nearer to the dense model, on the same masks, and never farther than it was."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import OptionError
from secateur.pipeline.reconstruct import Reconstruction
from tiny import bytes_of, rows, save_tiny, tensors_of, tiny_model

ROWS = rows(32, 16)  # 16 micro-batches of two rows, of which the eighth and the last are held out
HOW = Reconstruction(epochs=4, learning_rate=5e-3, batch_tokens=32)
OPTIONS = {"method": "magnitude", "calibration": ROWS}
HELD = [row for batch in (7, 15) for row in (2 * batch, 2 * batch + 1)]


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def hidden(model, ids):
    """What transformers' own forward gives after every block but the last, which it does not tell before its norm."""
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[1:-1]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "bfloat16"), ("qwen2", "float16"), ("mixtral", "bfloat16")],
)
def test_zeros_stay_and_the_rest_comes_nearer(tmp_path, family, dtype):
    source = save_tiny(tmp_path / "source", family, dtype)
    plain = secateur.prune(source, tmp_path / "plain", **OPTIONS).report
    report = secateur.prune(source, tmp_path / "out", reconstruct=HOW, **OPTIONS).report
    live = secateur.prune(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), reconstruct=HOW, **OPTIONS)

    before, after = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name] != 0, after[name] != 0) for name in before)
    assert report["zeros"] == plain["zeros"]
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(bytes_of(weight) == bytes_of(again[name]) for name, weight in live.model.state_dict().items())
    assert [b["reconstruction"] for b in live.report["blocks"]] == [b["reconstruction"] for b in report["blocks"]]
    for block in report["blocks"]:
        found = block["reconstruction"]
        assert found["error_after"] < found["error_before"]


def test_errors_are_those_of_the_written_model(tmp_path):
    """Of held-out rows, by transformers' own forward of the dense and of the written model."""
    source = save_tiny(tmp_path / "source", "llama", "bfloat16")
    report = secateur.prune(source, tmp_path / "out", reconstruct=HOW, **OPTIONS).report
    dense, pruned = (hidden(load(path), ROWS[HELD]) for path in (source, tmp_path / "out"))
    for block, wanted, found in zip(report["blocks"], dense, pruned, strict=False):
        squares = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
        assert block["reconstruction"]["error_after"] == pytest.approx(squares.mean().sqrt().item(), rel=1e-3)


def test_the_target_is_the_dense_stream_and_the_input_the_pruned_one(tmp_path):
    """The second block is asked to make up for the first: its error before training is that of both."""
    source = save_tiny(tmp_path / "source", "llama")
    report = secateur.prune(source, tmp_path / "out", reconstruct=HOW, **OPTIONS).report
    half = load(tmp_path / "out")
    for name, weight in secateur.prune(source, **OPTIONS).model.state_dict().items():
        if ".layers.0." not in name:
            half.state_dict()[name].copy_(weight)
    wanted, found = (hidden(model, ROWS[HELD])[1] for model in (load(source), half))
    squares = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert report["blocks"][1]["reconstruction"]["error_before"] == pytest.approx(
        squares.mean().sqrt().item(), rel=1e-3
    )


def test_divergence_leaves_the_block_as_the_method_left_it(tmp_path, caplog):
    source = save_tiny(tmp_path / "source", "llama", "bfloat16")
    secateur.prune(source, tmp_path / "plain", **OPTIONS)
    how = Reconstruction(epochs=2, learning_rate=1e4, batch_tokens=32)
    report = secateur.prune(source, tmp_path / "out", reconstruct=how, **OPTIONS).report
    plain, out = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert all(bytes_of(plain[name]) == bytes_of(out[name]) for name in plain)
    assert all(b["reconstruction"]["error_after"] == b["reconstruction"]["error_before"] for b in report["blocks"])
    assert sum("weights stay as they were" in record.message for record in caplog.records) == 3


def test_a_block_stops_when_held_out_sequences_gain_no_more(tmp_path):
    """Unrelated random rows: what is learnt of some is of no use for the others."""
    torch.manual_seed(0)
    noise = torch.randint(3, 120, (16, 16))
    source = save_tiny(tmp_path / "source", "llama")
    how = Reconstruction(epochs=200, learning_rate=2e-2, batch_tokens=32, patience=1)
    report = secateur.prune(source, tmp_path / "out", method="wanda", calibration=noise, reconstruct=how).report
    assert all(block["reconstruction"]["epochs"] < 200 for block in report["blocks"])


def test_matrices_that_are_left_out_stay(tmp_path):
    source = save_tiny(tmp_path / "source", "llama")
    secateur.prune(source, tmp_path / "out", reconstruct=HOW, exclude="mlp", **OPTIONS)
    former, out = tensors_of(source), tensors_of(tmp_path / "out")
    for name in former:
        if "mlp" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(former[name], out[name]), name
        elif "layernorm" in name:
            assert not torch.equal(former[name], out[name]), name


def test_packed_values_are_those_that_were_measured(tmp_path):
    source = save_tiny(tmp_path / "source", "llama", "bfloat16")
    packing = {"format": "bitmask", "values": "int8"}
    report = secateur.prune(source, tmp_path / "out", reconstruct=HOW, **packing, **OPTIONS).report
    secateur.unpack(tmp_path / "out", tmp_path / "dense")
    wanted, found = (hidden(load(path), ROWS[HELD])[0] for path in (source, tmp_path / "dense"))
    squares = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert report["blocks"][0]["reconstruction"]["error_after"] == pytest.approx(squares.mean().sqrt().item(), rel=1e-2)


def test_a_model_in_memory_leaves_as_it_came():
    model = tiny_model("llama", "bfloat16").train()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    former = [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
    secateur.prune(model, reconstruct=HOW, **OPTIONS)
    assert [(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()] == former
    assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_the_user_stay_and_have_no_say(dtype):
    model, other = tiny_model("llama", dtype), tiny_model("llama", dtype)
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    for each in (model, other):
        secateur.prune(each, reconstruct=HOW, **OPTIONS)
    assert all(bytes_of(a) == bytes_of(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all((p.grad == 1e3).all() for p in other.parameters())


def test_rows_of_unequal_length_count_by_their_tokens(tmp_path):
    """A micro-batch of one short row is held out beside a full one."""
    source = save_tiny(tmp_path / "source", "llama")
    mixed = [*ROWS[:15], *(row[:2] for row in ROWS[15:24])]
    how = Reconstruction(epochs=1, batch_tokens=2)  # every row is a micro-batch
    report = secateur.prune(source, tmp_path / "out", method="magnitude", calibration=mixed, reconstruct=how).report
    held = [row[None] for row in mixed[7::8]]
    assert [row.numel() for row in held] == [16, 2, 2]
    squares = []
    for row in held:
        wanted, found = (hidden(load(path), row)[0] for path in (source, tmp_path / "out"))
        squares += ((found - wanted).square().sum(-1) / wanted.square().sum(-1)).flatten().tolist()
    mean = sum(squares) / len(squares)
    assert report["blocks"][0]["reconstruction"]["error_after"] == pytest.approx(mean**0.5, rel=1e-3)


def test_the_seed_decides():
    first, same, other = (
        secateur.prune(copy.deepcopy(tiny_model("llama")), reconstruct=HOW, seed=seed, **OPTIONS).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    far = secateur.prune(tiny_model("llama"), reconstruct=HOW, seed=2**60, **OPTIONS)
    assert far.report["plan"]["reconstruct"]["seed"] == 2**60
    own = Reconstruction(epochs=1, batch_tokens=32, seed=5)
    report = secateur.prune(tiny_model("llama"), reconstruct=own, **OPTIONS).report
    assert report["plan"]["reconstruct"]["seed"] == 5


@pytest.mark.parametrize("allocation", ["uniform", "alpha"])
def test_too_few_tokens(tmp_path, caplog, allocation):
    source = save_tiny(tmp_path / "source", "llama")
    secateur.prune(source, tmp_path / "plain", allocation=allocation, **OPTIONS)
    few = {"method": "magnitude", "calibration": ROWS[:14], "allocation": allocation}
    report = secateur.prune(source, tmp_path / "out", reconstruct=HOW, **few).report
    assert caplog.text.count("14 sequences of 16 tokens are too few, it needs 16") == 1
    assert report["plan"]["reconstruct"] is None
    plain, out = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "out")
    assert all(torch.equal(plain[name], out[name]) for name in plain)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reconstruct": True, "propagate": "sequential"}, "goes with propagate block"),
        ({"reconstruct": Reconstruction(epochs=0)}, "at least 1"),
        ({"reconstruct": Reconstruction(epochs=1.5)}, "epochs is a whole number, not 1.5"),
        ({"reconstruct": {"epochs": 1}}, "is True, False or a secateur.Reconstruction"),
        ({"reconstruct": Reconstruction(learning_rate=float("nan"))}, "learning_rate must be positive"),
    ],
)
def test_options_out_of_range(tmp_path, options, told):
    with pytest.raises(OptionError, match=told):
        secateur.prune(tmp_path / "nowhere", tmp_path / "out", **options)


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    def none_left(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch.optim.Adam.step", none_left)
    with pytest.raises(
        secateur.errors.ModelError, match="block 0: too little memory to reconstruct it; a smaller --seqlen"
    ):
        secateur.prune(save_tiny(tmp_path / "source", "llama"), tmp_path / "out", reconstruct=HOW, **OPTIONS)

"""``propagate="sequential"``: each matrix sees what the pruned ones before it give, at one forward for a block."""

import copy
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from greenlet import greenlet
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import secateur
from families import FAMILIES
from secateur.errors import ModelError
from secateur.progress import Silent
from secateur.pruning import METHODS, SUMSQ, Method, Row, Statistics
from tiny import bytes_of, rows, same_bytes, tensors_of, tiny_model

TESTS = Path(__file__).parents[1]
ROWS = [*rows(4, 24, seed=1), *rows(3, 17, seed=2)]  # of two lengths: micro-batches of 2, 2, 2 and 1 rows
FEW = [*ROWS[:2], *ROWS[4:6]]  # too few for some experts

# The matrices of a block that share an input, in the order in which they run.
ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
UP, DOWN = ([f"mlp.experts.{key}[{e}]" for e in range(4)] for key in ("gate_up_proj", "down_proj"))
GROUPS = {
    "llama": [*ATTENTION, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "falcon": [["self_attention.query_key_value"], ["self_attention.dense"], ["mlp.dense_h_to_4h"],
               ["mlp.dense_4h_to_h"]],
    "mixtral": [*ATTENTION, UP, DOWN],
}  # fmt: skip
FORWARDS = {**{kind: len(groups) for kind, groups in GROUPS.items()}, "falcon": 3}  # attention and MLP share an input


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", 48)


@pytest.fixture
def short_of_memory(monkeypatch):
    monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device: 0)


def model_of(kind, dtype="float32", **changes):
    settings = {} if kind in ("llama", "gpt2") else copy.deepcopy(FAMILIES[kind])
    return tiny_model(kind, dtype, **{**settings, **changes})


def blocks_of(model):
    return [(n, m) for n, m in model.named_modules() if re.fullmatch(r".*\.(layers|h)\.\d+", n)]


def sequential(model, output=None, **options):
    return secateur.prune(model, output, **{"calibration": ROWS, "propagate": "sequential", **options})


def same_weights(a, b):
    return same_bytes(a.state_dict(), b.state_dict())


# The definition, written again.


def view(block, name):
    """A matrix as [out, in]."""
    path, expert = re.fullmatch(r"([^\[]*)(?:\[(\d)\])?", name).groups()
    if expert is not None:
        return block.get_parameter(path).data[int(expert)]
    module = block.get_submodule(path)
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


def experts_inputs(block, calls, enough):
    """What each expert's matrices see: the tokens routed to it, or all if these are too few."""
    hidden, index = (torch.cat([call[i] for call in calls]) for i in range(2))
    found = {}
    for expert in range(4):
        x = hidden[(index == expert).any(1)]
        x = x if len(x) >= enough else hidden
        gate, up = (x @ view(block, UP[expert]).T).chunk(2, dim=-1)
        found[UP[expert]], found[DOWN[expert]] = x, silu(gate) * up
    return found


def inputs_of(kind, model, block, names, enough):
    """Run the whole model on all rows, and return the inputs of some matrices of one block, [tokens, in]."""
    module = block.get_submodule("mlp.experts" if "experts" in names[0] else names[0])
    calls = []
    handle = module.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        for row in FEW if kind == "mixtral" else ROWS:
            model(input_ids=row[None], use_cache=False)
    handle.remove()
    if "experts" in names[0]:
        return experts_inputs(block, calls, enough)
    return dict.fromkeys(names, torch.cat([args[0].flatten(0, -2) for args in calls]))


def prune_by_definition(model, kind, method):
    for _, block in blocks_of(model):
        for names in GROUPS[kind]:
            inputs = inputs_of(kind, model, block, names, 32)
            for name in names:
                x, W = inputs[name].double(), view(block, name)
                if method == "wanda":
                    scores = W.double().abs() * x.square().sum(0).sqrt()
                    kept = scores.topk(W.shape[1] // 2, dim=1).indices
                    W.mul_(torch.zeros_like(W).scatter_(1, kept, 1.0))
                else:
                    sums = Statistics(tokens=len(x), gram_II=(x.T @ x).float())
                    W.copy_(METHODS[method](W.clone(), sums, 0.5, Row())[0])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", GROUPS)
def test_it_is_what_it_is_defined_to_be(kind, method, small_batches):
    model = model_of(kind)
    expected = copy.deepcopy(model)
    prune_by_definition(expected, kind, method)
    report = sequential(model, method=method, pattern="row", calibration=FEW if kind == "mixtral" else ROWS).report
    for name, weight in expected.state_dict().items():
        ours = model.state_dict()[name]
        assert torch.equal(ours == 0, weight == 0), name
        assert torch.allclose(ours, weight, rtol=1e-4, atol=1e-5), name
    assert {r["sparsity"] for r in report["matrices"]} == {0.5}
    assert any("routed_tokens" in r for r in report["matrices"]) == (kind == "mixtral")
    order = [f"{path}.{name}" for path, _ in blocks_of(model) for names in GROUPS[kind] for name in names]
    assert sorted(order) == sorted(r["name"] for r in report["matrices"])


def test_it_is_neither_block_nor_dense():
    results = []
    for propagate in ("sequential", "block", "dense"):
        model = model_of("llama")
        secateur.prune(model, calibration=ROWS, propagate=propagate)
        results.append(model)
    assert not any(same_weights(results[a], results[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    first = [model.model.layers[0] for model in results]
    assert torch.equal(first[0].self_attn.q_proj.weight, first[1].self_attn.q_proj.weight)
    assert not torch.equal(first[0].mlp.down_proj.weight, first[1].mlp.down_proj.weight)


# Two ways of the same sums.

WAYS = [*((kind, method) for kind in GROUPS for method in ("wanda", "sparsegpt"))]
WAYS += [(kind, "wanda") for kind in ("deepseek_v3", "gpt_oss", "jamba", "nemotron_h", "qwen3_next", "gptj", "lfm2")]


@pytest.mark.parametrize(("kind", "method"), WAYS)
def test_paused_together_or_one_forward_each_is_the_same(kind, method, small_batches, monkeypatch):
    together, apart = model_of(kind), model_of(kind)
    options = {"method": method, "calibration": FEW if kind in ("mixtral", "deepseek_v3") else ROWS}
    ours = sequential(together, **options).report
    monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device: 0)
    theirs = sequential(apart, **options).report
    assert same_weights(together, apart)
    assert ours["matrices"] == theirs["matrices"] and ours["left_out"] == theirs["left_out"]
    if kind in ("mixtral", "deepseek_v3"):
        assert any("routed_tokens" in r for r in ours["matrices"])


class Counts(Silent):
    """Counts the calls of each block once pruning has begun."""

    def __init__(self, model):
        self.calls = {}
        self.handles = [
            block.register_forward_pre_hook(lambda *args, name=name: self.count(name))
            for name, block in blocks_of(model)
        ]

    def count(self, name):
        self.calls[name] = self.calls.get(name, 0) + 1

    def start(self, task, total, done=0):
        self.total, self.done = total, done
        if task == "pruning":
            self.calls.clear()

    def advance(self, done=1, note=None):
        self.done += done


@pytest.mark.parametrize("kind", GROUPS)
def test_a_block_runs_once(kind, small_batches):
    """For each of four micro-batches."""
    model = model_of(kind)
    counts = Counts(model)
    sequential(model, progress=counts)
    assert list(counts.calls.values()) == [4, 4, 4]
    assert counts.done == counts.total == 12


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_or_once_for_each_input_and_once_more(kind, small_batches, short_of_memory):
    model = model_of(kind)
    counts = Counts(model)
    sequential(model, progress=counts)
    assert list(counts.calls.values()) == [4 * (FORWARDS[kind] + 1)] * 3
    assert counts.done == counts.total == 12


def test_memory_is_asked_for_what_all_paused_micro_batches_hold(small_batches, monkeypatch):
    """147 tokens of two hidden states and the widest input, 48 wide, in float32; of half the free memory."""
    needed = 2 * 147 * (2 * 32 + 48) * 4
    for free, runs in ((needed, 4), (needed - 2, 20)):
        monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device, free=free: free)
        model = model_of("llama")
        counts = Counts(model)
        sequential(model, progress=counts)
        assert list(counts.calls.values()) == [runs] * 3


# What is fed to it.


def test_unequal_rows_are_as_good_as_one_micro_batch_each(small_batches, monkeypatch):
    whole, single = model_of("llama"), model_of("llama")
    mixed = [ROWS[0], ROWS[4], ROWS[1], rows(1, 9)[0]]
    sequential(whole, calibration=mixed, method="sparsegpt")
    monkeypatch.setattr("secateur.pipeline.stream.MICRO_BATCH_TOKENS", 1)
    sequential(single, calibration=mixed, method="sparsegpt")
    assert same_weights(whole, single)  # no two rows in a line are of one length


def test_padding_is_no_text():
    batch = {"input_ids": torch.zeros(7, 24, dtype=torch.long), "attention_mask": torch.zeros(7, 24, dtype=torch.long)}
    for number, row in enumerate(ROWS):
        batch["input_ids"][number, : len(row)] = row
        batch["attention_mask"][number, : len(row)] = 1
    padded, plain = model_of("llama"), model_of("llama")
    report = sequential(padded, calibration=batch).report
    sequential(plain)
    assert same_weights(padded, plain)
    assert {r["tokens"] for r in report["matrices"]} == {147}


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_method_without_statistics_needs_no_order(kind):
    models = [model_of(kind), model_of(kind)]
    sequential(models[0], method="magnitude", calibration=None)
    secateur.prune(models[1], method="magnitude")
    assert same_weights(*models)


@pytest.mark.parametrize("select", [{"include": "mlp"}, {"exclude": ["q_proj", "down_proj"]}, {"allocation": {"1": 0}}])
def test_matrices_that_are_not_chosen_are_not_waited_for(select, small_batches, monkeypatch):
    together, apart = model_of("llama"), model_of("llama")
    counts = Counts(together)
    report = sequential(together, **select, progress=counts).report
    assert list(counts.calls.values()) == [4, 4, 4]
    monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device: 0)
    assert sequential(apart, **select).report["matrices"] == report["matrices"]
    assert same_weights(together, apart)
    dense = model_of("llama").state_dict()
    changed = {n.removesuffix(".weight") for n, w in together.state_dict().items() if not torch.equal(w, dense[n])}
    assert changed == {r["name"] for r in report["matrices"]}


# Disk.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "method"), [("llama", "sparsegpt"), ("gpt2", "wanda"), ("mixtral", "wanda")])
def test_disk_equals_live(tmp_path, kind, method, dtype):
    model_of(kind, dtype).save_pretrained(tmp_path / "source")
    report = sequential(tmp_path / "source", tmp_path / "out", method=method).report
    live = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    assert sequential(live, method=method).report["matrices"] == report["matrices"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(bytes_of(weight) == bytes_of(again[name]) for name, weight in live.state_dict().items())
    before, after = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert report["plan"]["propagate"] == "sequential"


# Killed at every point where the disk is touched, here and by a machine that is started again.

KILLER = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import dying_runs
from secateur.pipeline import estimate
estimate._operations_per_second = lambda: 1e9
folder, found = Path(sys.argv[2]), {}
OPTIONS = {**dying_runs.WANDA, "method": "sparsegpt", "propagate": "sequential"}
for kind, kinds, reboot in json.loads(sys.argv[3]):
    name = f"{kind}-{reboot}"
    (folder / name).mkdir()
    found[name] = dying_runs.scenario(folder / kind, folder / name, OPTIONS, kinds=kinds, reboot=reboot)
print(json.dumps(found))
"""


KILLED = {
    ("llama", False): ["put", "note"],
    ("mixtral", True): ["note"],  # here the forwards that are repeated must be the watched ones
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    model_of("llama", num_hidden_layers=2).save_pretrained(folder / "llama")
    three = {"num_experts_per_tok": 3}  # of which the order of the sum shows in the last bits
    model_of("mixtral", num_hidden_layers=2, **three).save_pretrained(folder / "mixtral")
    scenarios = json.dumps([(kind, kinds, reboot) for (kind, reboot), kinds in KILLED.items()])
    command = [sys.executable, "-c", KILLER, str(TESTS), str(folder), scenarios]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "reboot"), KILLED)
def test_a_run_killed_anywhere_goes_on_to_the_same_bytes(killed, kind, reboot):
    found = killed[f"{kind}-{reboot}"]
    every_point = {"note": 2, "put": 6}
    assert found["points"] == {point: every_point[point] for point in KILLED[kind, reboot]}
    assert found["problems"] == []


# Errors.


class Stop(Exception):
    pass


def breaking(error, left):
    def prune(W_OI, statistics, sparsity, pattern):
        left[0] -= 1
        if left[0] == 0:
            raise error("stop")
        return W_OI * 0.5, torch.ones_like(W_OI, dtype=torch.bool)

    return Method(prune, needs=frozenset([SUMSQ]), pattern="row")


def paused_greenlets():
    gc.collect()
    return [g for g in gc.get_objects() if type(g) is greenlet and g.parent is not None and not g.dead]


@pytest.mark.parametrize(
    ("error", "dtype", "memory"),
    [
        (Stop, "float32", 1 << 40), (Stop, "bfloat16", 0), (KeyboardInterrupt, "bfloat16", 1 << 40),
        (KeyboardInterrupt, "float32", 0), (ModelError, "float32", 1 << 40),
    ],
)  # fmt: skip
def test_an_error_leaves_finished_blocks_and_nothing_else(error, dtype, memory, small_batches, monkeypatch):
    """In the second block, after five of its seven matrices."""
    monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device: memory)
    model = model_of("llama", dtype)
    before, grad = copy.deepcopy(model.state_dict()), torch.is_grad_enabled()
    own = {name: set(vars(p)) for name, p in model.named_parameters()}
    with pytest.raises(error, match="stop") as caught:
        sequential(model, method=breaking(error, [13]))
    del caught
    changed = {n.removesuffix(".weight") for n, w in model.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {f"model.layers.0.{name}" for names in GROUPS["llama"] for name in names}
    assert not [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    assert {name: set(vars(p)) for name, p in model.named_parameters()} == own
    assert {w.dtype for w in model.state_dict().values()} == {w.dtype for w in before.values()}
    assert paused_greenlets() == []
    assert torch.is_grad_enabled() == grad
    sequential(model, method="wanda")  # works as ever


def test_an_error_in_the_block_itself_leaves_nothing_paused(monkeypatch, small_batches):
    model, plain = model_of("llama"), model_of("llama")
    calls, forward = [0], LlamaMLP.forward

    def breaks(self, x):
        calls[0] += 1
        if len(calls) > 1 and calls[0] == 6:
            raise Stop("stop")
        return forward(self, x)

    class Begins(Silent):
        def start(self, task, total, done=0):
            if task == "pruning":
                calls[:] = [0, "pruning"]

    monkeypatch.setattr(LlamaMLP, "forward", breaks)
    with pytest.raises(Stop):
        sequential(model, progress=Begins())
    assert paused_greenlets() == []
    assert not [n for n, m in model.named_modules() if m._forward_pre_hooks]
    changed = {n.split(".")[2] for n, w in model.state_dict().items() if not torch.equal(w, plain.state_dict()[n])}
    assert changed == {"0"}


def test_gradients_stay_as_they_were(small_batches):
    model = model_of("llama")
    sequential(model)
    assert torch.is_grad_enabled() and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model(input_ids=rows(1, 5)).logits.requires_grad


# Ways through a block.


def gate_first_or_last(self, x):
    y = x.flip(-1)
    if x[0, 0, 0] > 0:
        return self.down_proj(self.act_fn(self.gate_proj(y)) * self.up_proj(x))
    return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(y)))


def only_at_times(self, x):
    inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(inner) if x[0, 0, 0] > 0 else inner[..., : x.shape[-1]]


@pytest.mark.parametrize("memory", [1 << 40, 0])
@pytest.mark.parametrize("way", [gate_first_or_last, only_at_times])
def test_tokens_that_take_different_ways_are_refused_by_name(tmp_path, way, memory, small_batches, monkeypatch):
    monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device: memory)
    monkeypatch.setattr(LlamaMLP, "forward", way)
    model = model_of("llama")
    model.save_pretrained(tmp_path / "source")
    before = copy.deepcopy(model.state_dict())
    for source, output in ((model, None), (tmp_path / "source", tmp_path / "out")):
        with pytest.raises(ModelError) as caught:
            sequential(source, output)
        said = str(caught.value)
        assert "block 0" in said and "--propagate block" in said and "\n" not in said
        del caught
    assert same_bytes(before, model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    assert paused_greenlets() == []
    secateur.prune(model, calibration=ROWS, method="wanda")  # propagate block is not so particular


def leads_at_times(self, x):
    if x[0, 0, 0] > 0:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


@pytest.mark.parametrize("propagate", ["block", "sequential"])
def test_a_matrix_that_shares_its_input_at_times_is_named_with_the_other(propagate, small_batches, monkeypatch):
    monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device: 0)
    monkeypatch.setattr(LlamaMLP, "forward", leads_at_times)
    with pytest.raises(ModelError) as caught:
        sequential(model_of("llama"), propagate=propagate)
    assert len(set(re.findall(r"layers\.0\.mlp\.\w+_proj", str(caught.value)))) == 2


def twice(self, x):
    inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return self.down_proj(inner) + self.down_proj(inner.flip(-1))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_matrix_used_twice_is_pruned_once(method, small_batches, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", twice)
    models, reports = [model_of("llama"), model_of("llama")], []
    for model, memory in zip(models, (1 << 40, 0), strict=True):
        monkeypatch.setattr("secateur.pipeline.observation.free_memory_bytes", lambda device, memory=memory: memory)
        reports.append(sequential(model, method=method).report)
    assert [len(report["matrices"]) for report in reports] == [21, 21]
    assert [report["sparsity"] for report in reports] == [0.5, 0.5]
    assert same_weights(*models)

"""Experts whose matrices lie in 3-D parameters: seen one by one, fed by what is routed to them, and put back."""

import copy
import re

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

import secateur
from families import FAMILIES
from secateur.errors import ModelError
from secateur.models.experts import expert_keys
from secateur.models.matrices import matrices, watching
from secateur.pipeline import loop
from secateur.pruning import GRAM, SUM, SUMSQ, Method
from tiny import Interrupts, bytes_of, rows, same_bytes, tensors_of, tiny_model

KINDS = [
    "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "jamba", "phimoe", "aria_text", "granitemoe",
    "ernie4_5_moe", "gemma4_text", "qwen3_next", "minimax_m2", "deepseek_v4",
]  # fmt: skip
BY_HAND = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "aria_text", "nemotron_h"]
WIDTH = 40  # of an expert; the hidden state's is 32
ROWS = [*rows(2, 21, seed=5), *rows(2, 15, seed=105)]  # 72 tokens, of which an expert gets about 36


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """An estimate measures the machine; no test needs that."""
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


def moe(kind, **changes):
    """A tiny mixture whose matrices are all oblong."""
    settings = copy.deepcopy(FAMILIES[kind])
    settings["moe_intermediate_size" if "moe_intermediate_size" in settings else "intermediate_size"] = WIDTH
    model = tiny_model(kind, **{**settings, **changes})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):  # [experts, out], and nought as they come
            parameter.data.normal_(std=0.5, generator=generator)
    return model


def blocks_of(model):
    """Path and block, in order."""
    found = [(n, m) for n, m in model.named_modules() if re.fullmatch(r".*\.layers\.\d+", n)]
    assert len(found) == model.config.num_hidden_layers
    return found


def every_matrix(model):
    return {name: m for path, block in blocks_of(model) for name, m in matrices(block, path).items()}


def experts_of(model):
    """Path and experts of every mixture."""
    return {name: module for name, module in model.named_modules() if expert_keys(module)}


def routing(model, batches):
    """What each mixture is called with, for every batch: hidden states [T, D] and experts [T, k]."""
    seen = {name: [] for name in experts_of(model)}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append([*args, *kwargs.values()][:2]), with_kwargs=True
        )
        for name, module in experts_of(model).items()
    ]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(kind, experts, expert, x):
    """The input of an expert's second matrix, in float64."""
    W = experts.get_parameter("up_proj" if kind == "nemotron_h" else "gate_up_proj")[expert].detach().double()
    if kind == "nemotron_h":
        return (x.double() @ W.T).relu().square()
    if kind == "gpt_oss":
        inner = x.double() @ W + experts.gate_up_proj_bias[expert].detach().double()
        gate, up = inner[:, ::2].clamp(max=7.0), inner[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    inner = x.double() @ (W if kind == "aria_text" else W.T)
    return silu(inner[:, :WIDTH]) * inner[:, WIDTH:]


def batches_of(rows_):
    return [torch.stack(rows_[:2]), torch.stack(rows_[2:])]


# The function in place of transformers' own.


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_transformers_does(kind):
    model, ids, seen = moe(kind), rows(2, 20), set()
    with torch.no_grad(), watching(every_matrix(model), seen.update):
        ours = model(input_ids=ids, use_cache=False).logits
    assert {name for name in every_matrix(model) if name.endswith("]")} <= seen
    for theirs in ("eager", "grouped_mm"):
        model.config._experts_implementation = theirs
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_token_may_go_to_no_expert():
    (_, experts), *_ = experts_of(moe("mixtral")).items()
    experts.config._experts_implementation = "eager"
    x, weights, index = torch.randn(5, 32), torch.rand(5, 2), torch.tensor([[0, 4], [4, 1], [2, 3], [4, 4], [1, 0]])
    assert experts.num_experts == 4  # so there is no expert 4
    expected = experts(x, index, weights)
    experts.config._experts_implementation = "secateur"
    assert torch.allclose(experts(x, index, weights), expected, rtol=1e-4, atol=1e-5)


# Matrices.


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_matrix_is_its_own_slice(kind):
    model = moe(kind)
    (path, experts), *_ = experts_of(model).items()
    up, transposed = expert_keys(experts)[0], kind in ("gpt_oss", "aria_text")
    shapes = {up: (WIDTH if kind == "nemotron_h" else 2 * WIDTH, 32), "down_proj": (32, WIDTH)}
    found = {name: m for name, m in every_matrix(model).items() if name.startswith(path + ".")}
    assert list(found) == [f"{path}.{key}[{e}]" for key in shapes for e in range(4)]
    for name, matrix in found.items():
        key, expert = re.fullmatch(r".*\.(\w+)\[(\d)\]", name).groups()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        held = before[f"{path}.{key}"][int(expert)]
        assert matrix.shape == tuple(matrix.read().shape) == shapes[key]
        assert matrix.weights == held.numel() and matrix.parameter == f"{path}.{key}"
        assert torch.equal(matrix.read(), held.T if transposed else held)
        new = torch.randn(shapes[key])
        matrix.write(new)
        assert torch.equal(matrix.read(), new)
        held.copy_(new.T if transposed else new)  # a view of `before`
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_matrix_is_read_as_it_is_used(kind):
    """One expert by itself, from its matrices [out, in] alone."""
    model = moe(kind)
    (path, experts), *_ = experts_of(model).items()
    experts.config._experts_implementation = "eager"
    found, x = every_matrix(model), torch.randn(9, 32)
    for expert in range(4):
        up, down = (found[f"{path}.{key}[{expert}]"].read() for key in expert_keys(experts))
        biases = [
            getattr(experts, f"{key}_bias")[expert] if kind == "gpt_oss" else None for key in expert_keys(experts)
        ]
        inner = linear(x, up, biases[0])
        inner = experts.act_fn(inner) if kind == "nemotron_h" else experts._apply_gate(inner)
        alone = experts(x, torch.full((9, 1), expert), torch.ones(9, 1))
        assert torch.allclose(alone, linear(inner, down, biases[1]), rtol=1e-4, atol=1e-5)


def routers(model):
    return {n: p for n, p in model.named_parameters() if re.search(r"\.(gate|router)\.", n)}


@pytest.mark.parametrize(
    "kind",
    [
        "mixtral", "deepseek_v3", "gpt_oss", "jamba", "qwen2_moe", "granitemoe",
        "hunyuan_v1_moe",
    ],
)  # fmt: skip
def test_a_router_is_never_touched(kind):
    model = tiny_model(kind, **copy.deepcopy(FAMILIES[kind]))
    before = {name: p.detach().clone() for name, p in routers(model).items()}
    assert before
    secateur.prune(model, method="magnitude")
    assert all(torch.equal(p, before[name]) for name, p in routers(model).items())


# Inputs.


@pytest.mark.parametrize("kind", BY_HAND)
def test_each_matrix_is_shown_what_is_routed_to_its_expert(kind):
    model, ids, shown = moe(kind), rows(3, 20), {}
    calls = routing(model, [ids])
    chosen = {name: m for name, m in every_matrix(model).items() if m.expert is not None}
    with torch.no_grad(), watching(chosen, shown.update):
        model(input_ids=ids, use_cache=False)
    assert shown.keys() == chosen.keys()
    for path, experts in experts_of(model).items():
        ((hidden, index),) = calls[path]
        for expert in range(4):
            routed = hidden[(index == expert).any(1)]
            assert 0 < len(routed) < len(hidden)
            first, second = (shown[f"{path}.{key}[{expert}]"] for key in expert_keys(experts))
            assert torch.allclose(first, routed, atol=1e-5)
            assert torch.allclose(second.double(), by_hand(kind, experts, expert, routed), rtol=1e-4, atol=1e-5)


def test_a_matrix_shown_everywhere_sees_all_tokens_and_changes_no_output():
    model, ids, shown = moe("mixtral"), rows(3, 20), {}
    ((hidden, index),) = routing(model, [ids])["model.layers.0.mlp.experts"]
    path, block = blocks_of(model)[0]
    experts, chosen = block.mlp.experts, matrices(block, path)
    poor = [f"{path}.mlp.experts.{key}[2]" for key in ("gate_up_proj", "down_proj")]
    with torch.no_grad(), watching(chosen, lambda inputs: None):
        plain = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad(), watching(chosen, shown.update, everywhere=poor):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
    assert torch.allclose(shown[poor[0]], hidden, atol=1e-6)
    assert torch.allclose(shown[poor[1]].double(), by_hand("mixtral", experts, 2, hidden), rtol=1e-4, atol=1e-5)
    others = shown[f"{path}.mlp.experts.gate_up_proj[1]"]
    assert torch.allclose(others, hidden[(index == 1).any(1)], atol=1e-6)


# Statistics.


def recorder(needs):
    """A method that keeps the statistics it was given, and zeroes the first half of every row."""
    kept = []

    def prune(W_OI, statistics, sparsity, pattern):
        kept.append(statistics)
        mask = torch.arange(W_OI.shape[1]).expand(W_OI.shape) >= W_OI.shape[1] // 2
        return W_OI * mask, mask

    return kept, Method(prune, needs=frozenset(needs), pattern="row")


def expected_inputs(kind, model, calls, enough):
    """The inputs of every expert's matrices, and how many tokens were routed to it; by name."""
    found = {}
    for path, experts in experts_of(model).items():
        hidden = torch.cat([x for x, _ in calls[path]])
        index = torch.cat([i for _, i in calls[path]])
        for expert in range(4):
            routed = hidden[(index == expert).any(1)]
            x = routed if len(routed) >= enough else hidden
            up, down = (f"{path}.{key}[{expert}]" for key in expert_keys(experts))
            found[up] = (x.double(), len(routed))
            found[down] = (by_hand(kind, experts, expert, x), len(routed))
    return found


def check_statistics(kind, dense, calls, enough, kept, records):
    """Whether each expert's sums are those of its tokens, or of all where its own are not `enough`."""
    named = {record["name"]: (sums, record) for sums, record in zip(kept, records, strict=True)}
    fed = set()
    for name, (x, routed) in expected_inputs(kind, dense, calls, enough).items():
        sums, record = named[name]
        assert sums.tokens == record["tokens"] == len(x)
        assert record.get("routed_tokens") == (routed if routed < enough else None)
        if sums.sum_I is not None:
            assert torch.allclose(sums.sum_I, x.sum(0), rtol=1e-4, atol=1e-4)
        assert torch.allclose(sums.sumsq_I, x.square().sum(0), rtol=1e-4, atol=1e-6)
        if sums.gram_II is not None:
            assert torch.allclose(sums.gram_II.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        fed.add(routed >= enough)
    assert fed == {True, False}
    assert not [r for n, (_, r) in named.items() if not n.endswith("]") and "routed_tokens" in r]


@pytest.mark.parametrize(("needs", "enough"), [((SUM, SUMSQ), 32), ((SUM, SUMSQ, GRAM), WIDTH)])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_the_sums_are_over_the_tokens_of_each_expert(kind, needs, enough):
    """Or over all tokens of the layer, for both matrices of an expert that too few tokens reach."""
    model = moe(kind)
    dense, calls = copy.deepcopy(model), routing(model, batches_of(ROWS))
    kept, method = recorder(needs)
    report = secateur.prune(model, method=method, calibration=ROWS, propagate="dense").report
    check_statistics(kind, dense, calls, enough, kept, report["matrices"])


@pytest.mark.parametrize("propagate", ["block", "dense"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_experts_whose_gram_matrices_memory_cannot_hold_at_once_are_observed_in_turn(kind, propagate, monkeypatch):
    """One expert at a time, in as many forwards of the block; nothing else changes, bit for bit."""
    options = {"calibration": ROWS, "propagate": propagate, "method": "wanda+pcg"}
    together, in_turn = moe(kind), moe(kind)
    want = secateur.prune(together, **options).report
    held, prune_matrix = [], loop.prune_matrix

    def watched(as_written, matrix, job, observer):
        owners = {observer.chosen[name].owner for name in observer._sums if observer.chosen[name].expert is not None}
        held.append((matrix.expert is not None, len(owners)))
        return prune_matrix(as_written, matrix, job, observer)

    monkeypatch.setattr(loop, "prune_matrix", watched)
    monkeypatch.setattr(loop, "room", lambda device: 4 * (32**2 + WIDTH**2))
    got = secateur.prune(in_turn, **options).report
    assert set(held) == {(True, 1), (False, 0)}
    assert same_bytes(in_turn.state_dict(), together.state_dict())
    assert got["matrices"] == want["matrices"]
    assert [b["output_error"] for b in got["blocks"]] == [b["output_error"] for b in want["blocks"]]


def test_the_estimate_counts_the_forwards_of_experts_in_turn(tmp_path, monkeypatch):
    mixture = moe("mixtral")
    experts = len(mixture.model.layers[0].mlp.experts.gate_up_proj)
    mixture.save_pretrained(tmp_path / "model")

    def seconds(**options):
        asked = {"calibration": ROWS, "method": "wanda+pcg", "dry_run": True, **options}
        return secateur.prune(tmp_path / "model", tmp_path / "out", **asked).report["estimate"]["seconds"]

    together, sequential, wanda = seconds(), seconds(propagate="sequential"), seconds(method="wanda")
    dense = seconds(exclude="experts")
    forward = together - sequential  # "block" runs each block once more
    for room in (0, 1, 1.5):
        bytes_ = int(room * 4 * (32**2 + WIDTH**2))
        monkeypatch.setattr("secateur.pipeline.estimate.room", lambda device, bytes_=bytes_: bytes_)
        assert seconds() == pytest.approx(together + (experts - 1) * forward)
        assert seconds(propagate="sequential") == sequential and seconds(method="wanda") == wanda
        assert seconds(exclude="experts") == dense


def test_after_pruned_blocks_they_are_over_what_these_give():
    model = moe("mixtral")
    mixed = copy.deepcopy(model)
    kept, method = recorder([SUMSQ])
    report = secateur.prune(model, method=method, calibration=ROWS).report
    calls = {}
    for (path, block), (_, pruned) in zip(blocks_of(mixed), blocks_of(model), strict=True):
        calls[f"{path}.mlp.experts"] = routing(mixed, batches_of(ROWS))[f"{path}.mlp.experts"]
        dense = copy.deepcopy(block.state_dict())
        block.load_state_dict(pruned.state_dict())
        pruned.load_state_dict(dense)  # `model` becomes the dense one
    check_statistics("mixtral", model, calls, 32, kept, report["matrices"])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_underfed_expert_changes_no_other_matrix(method):
    options = {"method": method, "calibration": ROWS, "propagate": "dense"}
    model, without = moe("mixtral"), moe("mixtral")
    report = secateur.prune(model, **options).report
    poor = {r["name"]: r for r in report["matrices"] if "routed_tokens" in r}
    assert 0 < len(poor) < 24
    assert all(r["routed_tokens"] < r["tokens"] == 72 for r in poor.values())
    rest = secateur.prune(without, **options, exclude=[re.escape(name) + "$" for name in poor]).report
    assert rest["matrices"] == [r for r in report["matrices"] if r["name"] not in poor]
    theirs = every_matrix(without)
    assert all(torch.equal(m.read(), theirs[n].read()) != (n in poor) for n, m in every_matrix(model).items())


@pytest.mark.parametrize("propagate", ["block", "dense", "sequential"])
@pytest.mark.parametrize("include", ["experts", "experts.*down_proj", "gate_up_proj"])
def test_an_expert_that_no_token_reaches_is_pruned_by_all(propagate, include):
    model = moe("gpt_oss", num_hidden_layers=1, layer_types=["full_attention"])
    path, experts = next(iter(experts_of(model).items()))
    model.model.layers[0].mlp.router.bias.data[2] = -1e4
    dense = copy.deepcopy(model)
    ((hidden, index), (more, _)) = routing(model, batches_of(ROWS))[path]
    assert not (index == 2).any()
    everything = torch.cat([hidden, more])
    report = secateur.prune(model, calibration=ROWS, method="wanda", include=include, propagate=propagate).report
    records = {r["name"]: r for r in report["matrices"]}
    assert len(records) == (8 if include == "experts" else 4)
    found, former = every_matrix(model), every_matrix(dense)
    for key, columns in (("gate_up_proj", 32), ("down_proj", WIDTH)):
        name = f"{path}.{key}[2]"
        if name not in records:
            continue
        assert (records[name]["routed_tokens"], records[name]["tokens"]) == (0, 72)
        before_it = experts if propagate == "sequential" else experts_of(dense)[path]
        x = everything.double() if key == "gate_up_proj" else by_hand("gpt_oss", before_it, 2, everything)
        scores = former[name].read().abs() * x.square().sum(0).sqrt()
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(columns // 2).indices, True)
        assert torch.equal(found[name].read(), former[name].read() * kept)


# A live model is left as it came.


def state_of(model):
    """What a run must put back, but for the weights."""
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    own = {n: set(vars(m)) for n, m in model.named_modules()}
    parameters = {n: (id(p), p.dtype, p.data_ptr(), set(vars(p))) for n, p in model.named_parameters()}
    return model.config.to_dict(), model.config._experts_implementation, hooks, own, parameters


class Stop(Exception):
    pass


@pytest.mark.parametrize("propagate", ["block", "sequential"])
@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt, ModelError])
@pytest.mark.parametrize("theirs", ["eager", "grouped_mm"])
def test_a_live_model_is_left_as_it_came(propagate, error, theirs):
    model, left = moe("mixtral").bfloat16(), [17]

    def breaks(W_OI, statistics, sparsity, pattern):
        left[0] -= 1
        if left[0] == 0 and error:
            raise error("stop")
        return W_OI * 0.5, torch.ones_like(W_OI, dtype=torch.bool)

    model.config._experts_implementation = theirs
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    method = Method(breaks, needs=frozenset([SUMSQ]), pattern="row")
    options = {"method": method, "calibration": ROWS, "propagate": propagate}
    if error is None:
        secateur.prune(model, **options)
    else:
        with pytest.raises(error, match="stop"):
            secateur.prune(model, **options)
    assert state_of(model) == before
    assert not [n for n, m in model.named_modules() if "secateur_watch" in vars(m)]
    done = {n for n, w in model.state_dict().items() if not torch.equal(w, weights[n])}
    assert {n.split(".")[2] for n in done} == ({"0"} if error else {"0", "1", "2"})


# Disk.

ON_DISK = {
    "mixtral": r"block_sparse_moe\.experts\.\d\.w[123]|self_attn\.[qkvo]_proj",
    "qwen3_moe": r"experts\.\d\.(gate|up|down)_proj|self_attn\.[qkvo]_proj|\.0\.mlp\.(gate|up|down)_proj",
    "deepseek_v3": r"experts(\.\d)?\.(gate|up|down)_proj|\.0\.mlp\.(gate|up|down)_proj|"
    r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
    "gpt_oss": r"experts\.(gate_up_proj|down_proj)|self_attn\.[qkvo]_proj",
}


@pytest.mark.parametrize(("method", "dtype"), [("wanda", torch.bfloat16), ("sparsegpt", torch.float32)])
@pytest.mark.parametrize("kind", ON_DISK)
def test_disk_equals_live(tmp_path, kind, method, dtype):
    source, out = tmp_path / "source", tmp_path / "out"
    moe(kind).to(dtype).save_pretrained(source)
    options = {"calibration": ROWS, "method": method, "pattern": "row"}
    report = secateur.prune(source, out, **options).report
    live = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert secateur.prune(live, **options).report["matrices"] == report["matrices"]
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert all(bytes_of(w) == bytes_of(again[n]) for n, w in live.state_dict().items())
    assert {w.dtype for n, w in again.items() if n.endswith("proj")} == {dtype}

    # by their names on disk: every row of every expert's matrix is half zero, and all else is the source's
    before, after = tensors_of(source), tensors_of(out)
    assert before.keys() == after.keys()
    pruned = {n for n in before if re.search(rf"({ON_DISK[kind]})(\.weight)?$", n)}
    assert len(pruned) >= 20 or kind == "gpt_oss"
    for name, W in after.items():
        if name in pruned:
            zeros = (W.mT if kind == "gpt_oss" and W.ndim == 3 else W).eq(0).sum(-1)
            assert (zeros == (W.shape[-2 if kind == "gpt_oss" and W.ndim == 3 else -1]) // 2).all()
        else:
            assert bytes_of(W) == bytes_of(before[name])
    for record in report["matrices"]:
        assert record["sparsity"] == 0.5 and record["zeros"] == record["pruned"]
    assert report["weights"] == sum(before[name].numel() for name in pruned)
    assert report["left_out"] == []


@pytest.mark.parametrize("propagate", ["block", "sequential"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, propagate):
    source, options = tmp_path / "source", {"calibration": ROWS, "propagate": propagate}
    moe("mixtral").save_pretrained(source)
    whole = secateur.prune(source, tmp_path / "whole", **options).report["matrices"]
    unfinished = set()
    for steps in range(2, 100, 3 if propagate == "block" else 2):
        out = tmp_path / f"out{steps}"
        try:
            secateur.prune(source, out, **options, progress=Interrupts(steps))
            break
        except KeyboardInterrupt:
            journal = out.with_name(f"out{steps}.secateur") / "journal.jsonl"
            unfinished.add(len(journal.read_text().splitlines()) if journal.exists() else 0)
            report = secateur.prune(source, out, **options).report
        assert report["matrices"] == whole, steps
        assert same_bytes(tensors_of(out), tensors_of(tmp_path / "whole")), steps
    assert unfinished == {0, 1, 2}


# What cannot be pruned.


def plain(kind):
    return tiny_model(kind, **copy.deepcopy(FAMILIES[kind]))


@pytest.mark.parametrize("propagate", ["block", "dense", "sequential"])
@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_a_matrix_that_is_never_called_stays_dense_and_is_listed(kind, propagate):
    model = plain(kind)
    before = copy.deepcopy(model.state_dict())
    report = secateur.prune(model, calibration=ROWS, propagate=propagate).report
    dense = [n.removesuffix(".weight") for n in before if n.endswith("dt_proj.weight")]
    assert report["left_out"] == sorted(dense)
    assert len(dense) == (3 if kind == "mamba" else 2)
    assert all(torch.equal(model.state_dict()[n + ".weight"], before[n + ".weight"]) for n in dense)
    assert all(r["sparsity"] == 0.5 and r["name"] not in dense for r in report["matrices"])
    left = sum(before[n + ".weight"].numel() for n in dense)
    assert report["zeros"] == (report["weights"] - left) / 2
    assert report["sparsity"] == report["zeros"] / report["weights"] < 0.5


def test_too_many_of_them_are_refused_by_name(tmp_path):
    model = plain("mamba")
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "model")
    for source, output in ((model, None), (tmp_path / "model", tmp_path / "out")):
        with pytest.raises(ModelError) as caught:
            secateur.prune(source, output, calibration=ROWS, include=["dt_proj", "x_proj"])
        said = str(caught.value)
        assert said.startswith("backbone.layers.0.mixer.dt_proj and 2 more: ") and "--exclude" in said
        assert "17%" in said and "\n" not in said
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_method_that_needs_no_inputs_prunes_them():
    model = plain("mamba")
    report = secateur.prune(model, method="magnitude", include="dt_proj").report
    assert report["left_out"] == [] and report["sparsity"] == 0.5
    assert all(layer.mixer.dt_proj.weight.eq(0).float().mean() == 0.5 for layer in model.backbone.layers)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("kind", ["llama4_text", "dbrx"])
def test_fused_weights_of_unknown_layout_are_refused_by_name(tmp_path, kind, method):
    source = tmp_path / "source"
    model = plain(kind)
    model.save_pretrained(source)
    for target, output in ((model, None), (source, tmp_path / "out")):
        with pytest.raises(ModelError, match=r"experts.*layout is unknown") as caught:
            secateur.prune(target, output, calibration=ROWS, method=method)
        assert "\n" not in str(caught.value) and "--exclude" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    secateur.prune(source, tmp_path / "out", calibration=ROWS, method=method, exclude="experts")
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for name, tensor in after.items():
        if "experts" in name and "shared" not in name:
            assert bytes_of(tensor) == bytes_of(before[name])
    assert any(bytes_of(after[name]) != bytes_of(before[name]) for name in after)

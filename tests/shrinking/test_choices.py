"""What is chosen, against choices made here with transformers' own forward."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

import secateur
from families import FAMILIES
from secateur.errors import OptionError
from secateur.models.anatomy import find_blocks
from secateur.progress import Silent
from secateur.shrinking.config import Config, rounded
from secateur.shrinking.depth import check_layers, least_influential, units
from shrunken import without_blocks
from test_families import family_model
from tiny import edit_json, rows, save_tiny, tensors_of

ROWS = rows(6, 24)
COMMON = {"round": 8, "calibration": ROWS, "progress": Silent()}


def predictions(model):
    with torch.no_grad():
        return log_softmax(model(input_ids=ROWS, use_cache=False).logits.double(), dim=-1)


def divergence(own, other):
    return float(kl_div(other, own, log_target=True, reduction="sum") / ROWS.numel())


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A llama of five blocks."""
    return save_tiny(tmp_path_factory.mktemp("deep") / "model", "llama", num_hidden_layers=5)


def opened(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_blocks_go_one_by_one_by_what_is_predicted_without_them(deep, tmp_path):
    model, gone = opened(deep), []
    own, blocks = predictions(model), find_blocks(model)[1]
    steps = []
    for _ in range(3):
        tried = {}
        for index in set(range(5)) - set(gone):
            with without_blocks(blocks, [*gone, index]):
                tried[index] = divergence(own, predictions(model))
        gone.append(min(tried, key=tried.get))
        steps.append(tried)
    report = secateur.shrink(deep, tmp_path / "out", layers=3, **COMMON)
    assert report["removed_layers"] == sorted(gone)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    last = next(step for step in report["steps"] if step["step"] == "layers")
    assert last["removed"] == gone
    assert {int(name): kl for name, kl in last["tried"].items()} == pytest.approx(steps[-1], rel=1e-3)


def test_influence_is_one_less_the_cosine_of_input_and_output(deep, tmp_path):
    model = opened(deep)
    states: list[torch.Tensor] = []
    for block in find_blocks(model)[1]:
        block.register_forward_hook(
            lambda m, args, out: states.extend((args[0], out if torch.is_tensor(out) else out[0]))
        )
    predictions(model)
    expected = [
        1 - float(cosine_similarity(a, b, dim=-1).mean()) for a, b in zip(states[::2], states[1::2], strict=True)
    ]
    report = secateur.shrink(deep, tmp_path / "out", layers=2, depth="influence", **COMMON)
    assert report["steps"][0]["influence"] == pytest.approx(expected, rel=1e-4)
    assert report["removed_layers"] == sorted(sorted(range(5), key=expected.__getitem__)[:2])


def test_experts_stay_that_give_most_to_their_tokens(tmp_path):
    model = family_model("mixtral")
    model.save_pretrained(tmp_path / "model")
    experts = model.requires_grad_(False).model.layers[0].mlp.experts
    seen: list[tuple[torch.Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda m, args: seen.append(args))
    predictions(model)
    hidden, chosen, weights = seen[0]
    hidden = hidden.reshape(-1, hidden.shape[-1])
    salience = []
    for expert in range(4):
        token, slot = torch.where(chosen == expert)
        gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T
        salience.append(float((weights[token, slot] * out.norm(dim=-1)).mean()) if len(token) else 0.0)
    report = secateur.shrink(tmp_path / "model", tmp_path / "out", experts=0.5, **COMMON)
    assert report["steps"][0]["salience"][0] == pytest.approx(salience, rel=1e-3)
    assert report["kept_experts"][0] == sorted(sorted(range(4), key=salience.__getitem__)[2:])


def test_a_target_is_split_where_it_harms_predictions_least(deep, tmp_path):
    report = secateur.shrink(deep, tmp_path / "out", target=0.4, propagate="dense", **COMMON)
    split = next(step for step in report["steps"] if step["step"] == "split")
    assert len(split["kl"]) == 2  # all heads and many neurons, or half of the heads and few
    best = min(split["kl"].values())
    after = divergence(predictions(opened(deep)), predictions(opened(tmp_path / "out")))
    assert after == pytest.approx(best, rel=1e-2)
    removed = 1 - report["parameters"]["blocks_after"] / report["parameters"]["blocks_before"]
    assert abs(removed - 0.4) < 0.05


@pytest.mark.parametrize(("of", "config"), [("neurons", "intermediate_size"), ("layers", "num_hidden_layers")])
def test_a_target_may_be_taken_from_one_part_alone(of, config, deep, tmp_path):
    report = secateur.shrink(deep, tmp_path / "out", target=0.2, of=of, **COMMON)
    assert list(report["config"]) == [config]


def test_a_family_without_heads_to_remove_gives_neurons(tmp_path):
    save_tiny(tmp_path / "model", "gpt2")
    report = secateur.shrink(tmp_path / "model", tmp_path / "out", target=0.2, **COMMON)
    assert set(report["config"]) == {"n_inner"}


def test_heads_that_cannot_be_cut_soundly_are_not_chosen(tmp_path):
    """OLMo 2 has a norm over all heads: its config has them, and the proof finds out."""
    family_model("olmo2").save_pretrained(tmp_path / "model")
    report = secateur.shrink(tmp_path / "model", tmp_path / "out", target=0.3, **COMMON)
    assert set(report["config"]) == {"intermediate_size"}


@pytest.mark.parametrize("compensate", [True, False])
def test_compensation_takes_error_away(compensate, deep, tmp_path):
    report = secateur.shrink(deep, tmp_path / "out", neurons=0.5, compensate=compensate, criterion="wanda-sp", **COMMON)
    other = secateur.shrink(
        deep, tmp_path / "b", neurons=0.5, compensate=not compensate, criterion="wanda-sp", **COMMON
    )
    errors = [[m["output_error"] for m in r["matrices"]] for r in (report, other)]
    with_it, without = errors if compensate else errors[::-1]
    assert without == [None] * 5  # no Gram matrix was taken
    own = predictions(opened(deep))
    distances = [divergence(own, predictions(opened(tmp_path / name))) for name in ("out", "b")]
    assert (distances[0] < distances[1]) == compensate
    assert all(0 < error < 1 for error in with_it)


def test_a_bias_takes_over_what_neurons_gave_on_average(tmp_path):
    """With every neuron but eight gone, GPT-2's MLP gives about its mean, where it would give about nothing."""
    save_tiny(tmp_path / "model", "gpt2")
    secateur.shrink(tmp_path / "model", tmp_path / "out", neurons=0.9, propagate="dense", **COMMON)
    whole, small = opened(tmp_path / "model"), opened(tmp_path / "out")
    means: list[torch.Tensor] = []
    for model in (whole, small):
        model.transformer.h[0].mlp.register_forward_hook(lambda m, args, out: means.append(out.mean((0, 1))))
        predictions(model)
    assert torch.allclose(means[0], means[1], rtol=1e-3, atol=1e-4)


# Kinds of blocks that repeat.


def periodic(tmp_path, count=12, period=3):
    kinds = [["sliding_attention", "full_attention"][(i + 1) % period == 0] for i in range(count)]
    model = family_model("gemma3_text")
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers, config.layer_types = count, kinds
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory, Config(directory, AutoConfig.from_pretrained(directory))


def test_where_kinds_repeat_whole_periods_go(tmp_path):
    directory, config = periodic(tmp_path)
    assert config.period == 3
    assert units(config)[:2] == [(0, 1, 2), (1, 2, 3)]
    with pytest.raises(OptionError, match=r"layers 2: kinds of blocks repeat after 3, .* nearest: 3$"):
        check_layers(2, config)
    with pytest.raises(OptionError, match=r"layers 4: block 5 would come to a place of another kind, .* runs of 3"):
        check_layers([4], config)
    check_layers([4, 5, 6], config)
    check_layers([11], config)
    report = secateur.shrink(directory, tmp_path / "out", layers=6, **COMMON)
    assert len(report["removed_layers"]) == 6
    assert report["config"]["layer_types"][1] == config.get("layer_types")[:6]


def test_a_target_of_layers_is_whole_periods(tmp_path):
    directory, _ = periodic(tmp_path, count=8)
    report = secateur.shrink(directory, tmp_path / "out", target=0.3, of="layers", depth="influence", **COMMON)
    assert len(report["removed_layers"]) == 3
    with pytest.raises(OptionError, match=r"target 0.1: is 0 of 8 blocks, .* multiples of 3; .* fraction is 0.375"):
        secateur.shrink(directory, tmp_path / "out", target=0.1, of="layers", overwrite=True, **COMMON)


def test_kinds_that_no_list_tells_repeat_too(tmp_path):
    """Every second block of this model is a mixture, by a rule of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rule = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": []}
    config = AutoConfig.for_model("qwen2_moe", **{**FAMILIES["qwen2_moe"], **rule})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    report = secateur.shrink(tmp_path / "model", tmp_path / "out", layers=2, **COMMON)
    first, second = report["removed_layers"]
    assert second == first + 1
    with pytest.raises(OptionError, match="layers 1: kinds of blocks repeat after 2"):
        secateur.shrink(tmp_path / "model", tmp_path / "b", layers=1, **COMMON)


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path):
    """They lie beyond the last block, are not run by transformers, and would keep their old shapes."""
    from safetensors.torch import load_file, save_file

    family_model("glm4_moe").save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    more = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    save_file(tensors | more, path, {"format": "pt"})
    edit_json(tmp_path / "model" / "config.json", num_nextn_predict_layers=1)
    for number, options in enumerate(({"neurons": 0.5}, {"experts": 0.25}, {"layers": 1})):
        report = secateur.shrink(tmp_path / "model", tmp_path / str(number), **options, **COMMON)
        assert report["config"]["num_nextn_predict_layers"] == [1, 0]
        assert not any("layers.3." in name for name in tensors_of(tmp_path / str(number)))


def test_units_with_the_least_influence_go():
    assert least_influential([0.3, 0.1, 0.2, 0.4], [(0,), (1,), (2,), (3,)], 2) == [1, 2]
    assert least_influential([0.3, 0.1, 0.2, 0.4], [(0, 1), (1, 2), (2, 3)], 2) == [1, 2]


@pytest.mark.parametrize(
    ("width", "fraction", "multiple", "left"),
    [(1536, 0.2, 64, 1216), (1536, 1 / 3, 64, 1024), (3, 0.3, 1, 2), (48, 0.4, 8, 32)],
)
def test_what_is_left_is_the_nearest_multiple(width, fraction, multiple, left):
    assert rounded(width, fraction, multiple, "neurons") == left


def test_the_nearest_legal_fraction_is_told():
    with pytest.raises(OptionError, match=r"0.01 of 1536 leaves 1536 .* fraction is 0.04167, which leaves 1472"):
        rounded(1536, 0.01, 64, "neurons")
    with pytest.raises(OptionError, match=r"0.99 of 1536 leaves 0 .* fraction is 0.9583, which leaves 64"):
        rounded(1536, 0.99, 64, "neurons")
    with pytest.raises(OptionError, match="48 cannot be cut to a smaller multiple of 64; give a smaller --round"):
        rounded(48, 0.5, 64, "neurons")

"""Every cut of every family: the smaller model, opened by transformers alone, is the whole one with parts silenced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur
from families import FAMILIES
from secateur.errors import SecateurError
from secateur.models.anatomy import find_blocks
from secateur.progress import Silent
from shrunken import left_columns, logits, opened_elsewhere, silence_columns, without_blocks, without_experts
from test_families import family_model
from tiny import rows, tensors_of

WIDE = (
    "llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gemma2", "phi3", "olmo2", "granite", "smollm3", "gpt_oss",
    "qwen3_5_text",
)  # fmt: skip
HEADLESS = ("gpt2", "opt", "gpt_neox", "gptj", "falcon")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3")
CUTS = {
    **{(kind, "neurons"): {"neurons": 0.4} for kind in {*WIDE, *HEADLESS, *MIXTURES}},
    **{(kind, "heads"): {"heads": 0.5} for kind in {*WIDE, "mixtral", "qwen3_moe"} - {"olmo2"}},
    **{(kind, "layers"): {"layers": [1]} for kind in {*WIDE, *HEADLESS, *MIXTURES}},
    **{(kind, "experts"): {"experts": 0.25} for kind in MIXTURES},
    **{(kind, "all"): {"neurons": 0.4, "heads": 0.5, "layers": [0]} for kind in ("llama", "qwen2", "phi3", "mixtral")},
}
PLAIN = {"round": 8, "compensate": False, "propagate": "dense", "calibration": rows(6, 24), "progress": Silent()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for kind in {kind for kind, _ in CUTS} | {"olmo2"}:
        family_model(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def shrunken(models):
    """Every cut's report, and the logits that a process without Secateur gets from it."""
    reports = {
        cut: secateur.shrink(models / cut[0], models / "-".join(cut), criterion="wanda-sp", **options, **PLAIN)
        for cut, options in CUTS.items()
    }
    folders = [models / "-".join(cut) for cut in CUTS]
    return reports, opened_elsewhere(folders, models / "logits.pt")


@pytest.mark.parametrize("cut", sorted(CUTS), ids="-".join)
def test_the_smaller_model_is_the_whole_one_with_parts_silenced(cut, models, shrunken):
    from transformers import AutoModelForCausalLM

    reports, found = shrunken
    folder = models / "-".join(cut)
    whole, small = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (models / cut[0], folder))
    before, removed = logits(whole), reports[cut]["removed_layers"]
    blocks = find_blocks(whole)[1]
    if cut[1] == "experts":
        with without_experts(whole, small) as gone:
            expected = logits(whole)
        assert gone == sum(kept is not None for kept in reports[cut]["kept_experts"])
    elif cut[1] in ("neurons", "heads"):
        assert silence_columns(whole, small) > 0
        expected = logits(whole)
    else:
        with without_blocks(blocks, removed):
            if cut[1] == "all":
                again = find_blocks(small)[1]
                for block, other in zip(list(blocks)[1:], again, strict=True):
                    assert silence_columns(block, other) > 0
            expected = logits(whole)
    assert not torch.allclose(before, expected, rtol=1e-2)
    assert torch.allclose(found[str(folder)], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", HEADLESS)
def test_heads_without_a_width_of_their_own_are_refused_by_name(kind, models, tmp_path):
    with pytest.raises(SecateurError, match=f"^heads: {kind} makes its heads as wide .* neurons and layers can$"):
        secateur.shrink(models / kind, tmp_path / "out", heads=0.5, **PLAIN)
    assert not any(tmp_path.iterdir())


def test_a_norm_over_all_heads_is_found_out(models, tmp_path):
    """OLMo 2 divides queries by the length of all heads together, so that heads cannot go one by one."""
    with pytest.raises(
        SecateurError, match=r"self_attn\.o_proj: the smaller block gives another output .* olmo2 cannot"
    ):
        secateur.shrink(models / "olmo2", tmp_path / "out", heads=0.5, **PLAIN)
    assert not any(tmp_path.iterdir())


def test_what_is_not_cut_keeps_its_bytes(models, shrunken):
    before, after = (tensors_of(models / name) for name in ("llama", "llama-neurons"))
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert len(before) - len(same) == 9  # three matrices of an MLP in three blocks
    assert all("mlp" in name for name in before.keys() - set(same))


def test_the_config_says_what_changed_and_nothing_else(models, shrunken):
    import json

    for (kind, what), report in shrunken[0].items():
        old, new = (json.loads((Path(models) / p / "config.json").read_text()) for p in (kind, f"{kind}-{what}"))
        changed = {name for name in {*old, *new} if old.get(name) != new.get(name)}
        assert changed == set(report["config"]), (kind, what)
        assert all(new[name] == pair[1] for name, pair in report["config"].items())


def test_found_columns_are_those_that_are_left():
    W = torch.arange(12.0).reshape(2, 6)
    assert left_columns(W, W[:, [0, 3, 4]]).tolist() == [True, False, False, True, True, False]
    with pytest.raises(AssertionError):
        left_columns(W, W[:, [3, 0]])


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_cut_or_refused_in_one_line(kind, tmp_path):
    """A dry run proves each cut on one block of each kind."""
    family_model(kind).save_pretrained(tmp_path / "model")
    for options in ({"neurons": 0.4}, {"heads": 0.5}, {"layers": 1}, {"experts": 0.25}):
        refusal, plan = "", {}
        try:
            plan = secateur.shrink(tmp_path / "model", tmp_path / "out", dry_run=True, **options, **PLAIN)
        except SecateurError as error:
            refusal = str(error)
        assert bool(refusal) != bool(plan.get("config"))
        assert "\n" not in refusal and "/source-" not in refusal

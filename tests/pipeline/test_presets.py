"""What a preset stands for, and that what is asked for besides wins."""

import pytest

import secateur
from secateur.errors import OptionError
from secateur.pipeline.presets import PRESETS, chosen
from secateur.pipeline.reconstruct import Reconstruction
from tiny import rows

NOTHING = dict.fromkeys(("method", "update", "allocation", "reconstruct", "sparsity", "pattern"))


def asked(preset, **options):
    return chosen(preset, **{**NOTHING, **options})


def test_without_a_preset():
    assert asked(None) == {"method": "wanda+pcg", "reconstruct": False, "allocation": "uniform", "preset": None}
    assert asked(None, method="ria", update="pcg")["method"] == "ria+pcg"


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_given_wins(preset):
    how = Reconstruction(epochs=1)
    found = asked(preset, method="magnitude", allocation="owl", reconstruct=how, sparsity=0.7)
    assert found == {"method": "magnitude", "allocation": "owl", "reconstruct": how, "preset": preset}
    assert asked(preset, reconstruct=False)["reconstruct"] is False


@pytest.mark.parametrize(
    ("options", "allocation"),
    [
        ({"sparsity": 0.7}, "linear"), ({"sparsity": 0.6, "pattern": "row"}, "linear"), ({"sparsity": 0.5}, "uniform"),
        ({"sparsity": 0.96}, "uniform"), ({"sparsity": "0.7"}, "linear"), ({}, "uniform"),
        ({"sparsity": 0.7, "reconstruct": True}, "uniform"), ({"pattern": "1:4"}, "uniform"),
        ({"sparsity": 0.7, "allocation": "uniform"}, "uniform"),
    ],
)  # fmt: skip
def test_balanced_allocates_from_60_percent_on(options, allocation):
    assert asked("balanced", **options)["allocation"] == allocation
    assert asked("best", **options)["allocation"] == asked("fast", **options)["allocation"] == "uniform"


def test_an_update_follows_the_method():
    assert asked("best", method="wanda", update="pcg")["method"] == "wanda+pcg"
    assert asked("best", method="wanda+swaps", update="obs")["method"] == "wanda+swaps+obs"


def test_an_update_stands_in_place_of_the_presets_own():
    assert asked("best", update="obs")["method"] == "alps+obs"
    assert asked("fast", update="swaps+pcg")["method"] == asked(None, update="swaps+pcg")["method"] == "wanda+swaps+pcg"


def test_an_unknown_preset():
    with pytest.raises(OptionError, match="unknown preset 'bets': did you mean best"):
        asked("bets")


def test_a_preset_is_what_it_stands_for(tmp_path, model):
    """The same bytes as by its parts; the plan tells its name and its parts."""
    options = {"calibration": rows(16, 16), "overwrite": True}
    by_name = secateur.prune(model, tmp_path / "out", preset="balanced", **options).report
    by_parts = secateur.prune(model, tmp_path / "parts", **PRESETS["balanced"], **options).report
    assert by_name["plan"]["preset"] == "balanced" and by_parts["plan"]["preset"] is None
    assert by_name["plan"]["method"] == by_parts["plan"]["method"] == PRESETS["balanced"]["method"]
    assert by_name["matrices"] == by_parts["matrices"]

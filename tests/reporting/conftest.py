"""Recorded data of every kind, and the pages made of it."""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from report_data import Json, a_comparison, a_pruning, a_shrinking, a_training, evaluations, save_every_kind
from secateur.pipeline.reconstruct import Reconstruction
from secateur.reporting.page.records import load_records
from secateur.reporting.page.render import render_page


@pytest.fixture
def pruned() -> Json:
    return a_pruning()


@pytest.fixture
def refined() -> Json:
    """A pruning with stages, a preset, an allocation that was found, and reconstruction."""
    report = a_pruning()
    tried = [{"slope": 0.0, "kl": 0.5}, {"slope": -0.1, "kl": None}, {"slope": 0.1, "kl": 0.25}]
    report["plan"] |= {
        "method": "wanda+swaps+pcg:iterations=5", "preset": "best", "allocation": {"0": 0.4, "1": 0.6},
        "allocation_found": {"name": "linear", "mean": 0.5, "slope": 0.1, "rows": 4, "tokens": 32, "slopes": tried},
        "reconstruct": asdict(Reconstruction(seed=7, epochs=8, learning_rate=0.002)),
    }  # fmt: skip
    report["blocks"][0]["reconstruction"] = {"error_before": 0.5, "error_after": 0.25, "epochs": 3}
    report["blocks"][1]["reconstruction"] = {"error_before": 0.25, "error_after": 0.125, "epochs": 8}
    return report


@pytest.fixture
def shrunk() -> Json:
    return a_shrinking()


@pytest.fixture
def trained() -> Json:
    return a_training(a_pruning())


@pytest.fixture
def lines() -> list[Json]:
    return evaluations()


@pytest.fixture
def comparison() -> Json:
    return a_comparison()


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where data of each kind lies; to be read only."""
    return save_every_kind(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="session")
def page_as_html(every_kind: dict[str, Path]) -> Callable[[str], str]:
    """The page of a kind of data, made once."""
    return cache(lambda kind: render_page(load_records(every_kind[kind])))

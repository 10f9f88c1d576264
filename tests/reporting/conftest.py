"""Recorded data of every kind, and the pages made of it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from report_data import Json, a_comparison, a_pruning, a_shrinking, a_training, evaluations, save_every_kind
from secateur.reporting.page.records import load_records
from secateur.reporting.page.render import render_page


@pytest.fixture
def pruned() -> Json:
    return a_pruning()


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

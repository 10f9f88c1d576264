"""What several tests of evaluations need."""

import pytest

from tiny import TEXT


@pytest.fixture
def no_timing(monkeypatch):
    """Estimates do not time the machine."""
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


@pytest.fixture
def long_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5)
    return str(path)

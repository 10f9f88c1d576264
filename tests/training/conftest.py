from typing import Any

import pytest

import secateur
from tiny import tiny_model


@pytest.fixture
def sparse() -> Any:
    """A llama, half of whose weights are zero in every row."""
    return secateur.prune(tiny_model("llama"), method="magnitude", pattern="row").model

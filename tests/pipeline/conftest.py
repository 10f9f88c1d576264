import pytest


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """An estimate measures the machine; no test needs that."""
    monkeypatch.setattr("secateur.pipeline.estimate._operations_per_second", lambda: 1e9)


@pytest.fixture(scope="module")
def model(model_directory):
    """A llama in bfloat16 whose blocks lie across shards."""
    return model_directory("llama", "bfloat16", max_shard_size="24KB")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"

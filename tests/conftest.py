"""Tiny models on disk, made once for all tests; everything else is made by the test that needs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
os.environ["SECATEUR_PREFER"] = "memory"  # tiny matrices run faster dense, and timings must not decide what is tested


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch's threads; tiny matrices are not worth sharing out")
    parser.addoption(
        "--other-processor", type=int, metavar="SEED", help="give results other last bits (tests/other_processor.py)"
    )


@pytest.fixture(scope="session", autouse=True)
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """The threads, and the last bits, that this session's results have."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    seed = request.config.getoption("--other-processor")
    if seed is not None:
        from other_processor import install

        other = install(seed)
    yield
    if seed is not None:
        other._destroy()
    torch.set_num_threads(threads)


@pytest.fixture
def other_processor() -> Iterator[None]:
    """Other last bits wherever layout or alignment differ, on this processor too, while the test runs."""
    from other_processor import install

    other = install(1)
    yield
    other._destroy()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tiny import tiny_tokenizer

    return tiny_tokenizer()


ModelDirectory = Callable[..., Path]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> ModelDirectory:
    """``model_directory(family, dtype)``: a tiny model on disk, to be read only; a llama has a tokenizer too."""
    from tiny import save_tiny

    known: dict[str, Path] = {}

    def directory(family: str = "llama", dtype: str = "float32", **options: Any) -> Path:
        key = f"{family}-{dtype}" + "".join(f"-{k}-{v}" for k, v in sorted(options.items()))
        if key not in known:
            target = tmp_path_factory.mktemp("models") / key
            known[key] = save_tiny(
                target, family, dtype, tokenizer=tokenizer if family.startswith("llama") else None, **options
            )
        return known[key]

    return directory


@pytest.fixture(scope="session")
def sharded(model_directory: ModelDirectory) -> Path:
    """A llama in several shards, whose blocks lie across them."""
    return model_directory("llama", max_shard_size="24KB")


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What Secateur says while the test runs."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, listener = logging.getLogger("secateur"), Listener()
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    yield said
    log.removeHandler(listener)
    log.setLevel(level)

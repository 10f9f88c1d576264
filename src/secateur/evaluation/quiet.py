"""Keeps lm-eval and the libraries under it off the terminal, in one thread; other threads print and log as usual."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any, cast

from ..pipeline.machine import alone

LOUD = ("lm_eval", "datasets", "evaluate", "transformers", "huggingface_hub", "absl")  # whose logging is no news here


class _OfOthers:
    """stdout for all threads but the one that made this, which is silent."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.silent = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self.silent else int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep bars, warnings, logging and prints of lm-eval and its libraries off the terminal for a while."""
    bars: Any = import_module("tqdm").tqdm
    with alone(), warnings.catch_warnings(), redirect_stdout(cast(Any, _OfOthers(sys.stdout))):
        warnings.simplefilter("ignore")
        loggers = {logger: logger.level for logger in map(logging.getLogger, LOUD)}
        make, parallel = bars.__init__, os.environ.get("DISABLE_MULTIPROC")
        bars.__init__ = lambda bar, *args, **options: make(bar, *args, **{**options, "disable": True})
        os.environ["DISABLE_MULTIPROC"] = "1"  # no processes for standard errors
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            bars.__init__ = make
            os.environ.pop("DISABLE_MULTIPROC") if parallel is None else os.environ.update(DISABLE_MULTIPROC=parallel)
            for logger, level in loggers.items():
                logger.setLevel(level)

"""Evaluations of a model that Secateur wrote, kept beside its weights: ``evaluations.jsonl``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..pipeline.machine import software
from ..pipeline.run_directory import report_of

log = logging.getLogger("secateur")

EVALUATIONS = "evaluations.jsonl"


def now() -> str:
    """The date and time, UTC, as records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def record_evaluation(directory: Path, found: Mapping[str, Any]) -> None:
    """Append an evaluation to a directory of ours; any other directory is left alone."""
    if report_of(directory) is None:
        return
    line = {
        "schema": 1,
        "date": now(),
        **found,
        "software": software(),
    }
    path = directory / EVALUATIONS
    former = path.stat().st_size if path.exists() else None
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:  # the result is more than its record
        with suppress(OSError):  # no half line
            path.unlink(missing_ok=True) if former is None else os.truncate(path, former)
        log.warning("%s: the evaluation could not be recorded (%s)", directory, error.strerror)

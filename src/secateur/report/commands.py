"""The command line that made a model, from the plan that is recorded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ..pipeline.calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN
from ..pipeline.plan import Request
from ..pruning import METHODS

ALLOCATION = "allocation.yaml"  # stands for rules that were given in Python, or in a file of whatever name


def making_command(plan: Mapping[str, Any], output: str) -> str | None:
    """Return the line of the shell that makes a plan's output; None if no command can name what was given in Python."""
    if "command" in plan:
        options = option_words(plan, {"format": "bitmask", "values": None})
        return shlex.join(["secateur", plan["command"], plan["model"]["name"], output, *options])
    command = prune_command(plan)
    return None if command is None else shlex.join([*command[:3], output, *command[3:]])


def prune_command(plan: Mapping[str, Any]) -> list[str] | None:
    """Return the words of the command that makes a plan, but for OUTPUT; None if no command can name what was given.

    Only options that differ from the defaults.
    """
    calibration, name = plan.get("calibration"), plan["method"].partition(":")[0]
    given = calibration is not None and calibration["source"].startswith("the given ")
    if plan["model"].get("digest") is None or name not in METHODS or given:
        return None
    fixed = re.fullmatch(r"\d+:\d+", plan["pattern"])  # which implies the sparsity
    evaluate = plan.get("evaluate") or {"source": None, "seqlen": calibration and calibration["seqlen"]}
    usual = vars(Request())
    kept = ("method", "propagate", "format", "values", "dtype")
    wanted = {
        **{key: plan.get(key, usual[key]) for key in kept},
        "sparsity": None if fixed or plan["sparsity"] == 0.5 else plan["sparsity"],
        "pattern": None if plan["pattern"] == METHODS[name].pattern else plan["pattern"],
        "allocation": "uniform" if plan.get("allocation", "uniform") == "uniform" else ALLOCATION,
        "include": tuple(plan.get("include") or ()),
        "exclude": tuple(plan.get("exclude") or ()),
        "evaluate": evaluate["source"],
        "seqlen": None if evaluate.get("seqlen") == DEFAULT_SEQLEN else evaluate.get("seqlen"),
    }
    if calibration:
        wanted["calibration"] = calibration["source"].replace("wikitext2:train", "wikitext2")
        wanted["samples"] = None if calibration["samples"] == DEFAULT_SAMPLES else calibration["samples"]
        wanted["seed"] = calibration["seed"]
    return ["secateur", "prune", plan["model"]["name"], *option_words(wanted, usual)]


def option_words(wanted: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """The flags of options that are not as by default, in the order of the defaults."""
    words = []
    for key, usual in default.items():
        value = wanted.get(key, usual)
        for one in value if isinstance(value, tuple) else [value]:
            words += [] if value == usual else [f"--{key}", str(one)]
    return words

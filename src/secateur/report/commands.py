"""The command line that made a model, from the plan that is recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..pipeline.calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN
from ..pipeline.plan import Request
from ..pruning import METHODS, parse_pattern

ALLOCATION = "allocation.yaml"  # stands for rules that were given in Python, or in a file of whatever name


def prune_command(plan: Mapping[str, Any]) -> list[str] | None:
    """Return the words of the command that makes a plan, but for OUTPUT; None if no command can name what was given.

    Only options that differ from the defaults.
    """
    calibration, name = plan["calibration"], plan["method"].partition(":")[0]
    given = calibration is not None and calibration["source"].startswith("the given ")
    if plan["model"]["digest"] is None or name not in METHODS or given:
        return None
    fixed = parse_pattern(plan["pattern"]).fixed_sparsity is not None
    evaluate = plan["evaluate"] or {"source": None, "seqlen": calibration and calibration["seqlen"]}
    wanted = {
        **{key: plan[key] for key in ("method", "propagate", "format", "values", "dtype")},
        "sparsity": None if fixed or plan["sparsity"] == 0.5 else plan["sparsity"],
        "pattern": None if plan["pattern"] == METHODS[name].pattern else plan["pattern"],
        "allocation": "uniform" if plan["allocation"] == "uniform" else ALLOCATION,
        "include": tuple(plan["include"]),
        "exclude": tuple(plan["exclude"]),
        "evaluate": evaluate["source"],
        "seqlen": None if evaluate["seqlen"] == DEFAULT_SEQLEN else evaluate["seqlen"],
    }
    if calibration:
        wanted["calibration"] = calibration["source"].replace("wikitext2:train", "wikitext2")
        wanted["samples"] = None if calibration["samples"] == DEFAULT_SAMPLES else calibration["samples"]
        wanted["seed"] = calibration["seed"]
    return ["secateur", "prune", plan["model"]["name"], *option_words(wanted, vars(Request()))]


def option_words(wanted: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """The flags of options that are not as by default, in the order of the defaults."""
    words = []
    for key, usual in default.items():
        value = wanted.get(key, usual)
        for one in value if isinstance(value, tuple) else [value]:
            words += [] if value == usual else [f"--{key}", str(one)]
    return words

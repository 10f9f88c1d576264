"""The command line that made a model, from the plan that is recorded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ..errors import OptionError
from ..pipeline.calibration import DEFAULT_SAMPLES, DEFAULT_SEQLEN, TRAINING_SEQLEN
from ..pipeline.plan import Request
from ..pipeline.presets import chosen
from ..pipeline.reconstruct import Reconstruction
from ..pipeline.rules import ALLOCATIONS
from ..pruning import METHODS, parse_method
from ..pruning.methods import parts_of
from ..shrinking.request import ShrinkRequest
from ..training.request import TRAIN, FinetuneRequest
from .pruned import allocation_found

ALLOCATION = "allocation.yaml"  # stands for rules that were given in Python, or in a file of whatever name


def making_command(plan: Mapping[str, Any], output: str) -> str | None:
    """Return the line of the shell that makes a plan's output; None if no command can name what was given in Python."""
    command = making_words(plan)
    return None if command is None else shlex.join([*command[:3], output, *command[3:]])


def making_words(plan: Mapping[str, Any]) -> list[str] | None:
    """Return the words of the command that makes a plan, but for OUTPUT; None if no command can name what was given.

    Only options that differ from the defaults.
    """
    if "command" not in plan:
        return prune_command(plan)
    if plan["command"] == "shrink":
        return shrink_command(plan)
    if plan["command"] == "finetune":
        return finetune_command(plan)
    options = option_words(plan, {"format": "bitmask", "values": None})
    return ["secateur", plan["command"], plan["model"]["name"], *options]


def prune_command(plan: Mapping[str, Any]) -> list[str] | None:
    """Return the words of ``prune`` for a plan, as `making_words` does."""
    reconstruct = _default_reconstruction(plan)
    if plan["model"].get("digest") is None or _given(plan) or reconstruct is None:
        return None
    try:
        usual, pattern = _usual(plan, reconstruct), parse_method(plan["method"]).pattern
    except OptionError:
        return None
    fixed = re.fullmatch(r"\d+:\d+", plan["pattern"])  # which implies the sparsity
    rules = rules_of(plan)
    kept = ("method", "propagate", "format", "values", "dtype")
    wanted = {
        **{key: plan.get(key, usual[key]) for key in kept},
        "sparsity": None if fixed or plan["sparsity"] == 0.5 else plan["sparsity"],
        "pattern": None if plan["pattern"] == pattern else plan["pattern"],
        "allocation": rules if rules in ALLOCATIONS else ALLOCATION,
        "reconstruct": reconstruct,
        "include": tuple(plan.get("include") or ()),
        "exclude": tuple(plan.get("exclude") or ()),
        **_texts(plan),
    }
    preset = ["--preset", usual["preset"]] if usual["preset"] else []
    return ["secateur", "prune", plan["model"]["name"], *preset, *option_words(wanted, usual)]


def _default_reconstruction(plan: Mapping[str, Any]) -> bool | None:
    """Whether blocks were reconstructed; None if they were with settings that only Python can give."""
    how = plan.get("reconstruct")
    return how is not None if how is None or {**how, "seed": None} == asdict(Reconstruction()) else None


def _usual(plan: Mapping[str, Any], reconstruct: bool) -> dict[str, Any]:
    """The defaults of ``prune`` under a plan's preset, which is left out if it would reconstruct what was not.

    Raises:
        OptionError: no such preset or pattern.
    """
    given = {"sparsity": plan["sparsity"], "pattern": plan["pattern"]}
    none = {"method": None, "update": None, "allocation": None, "reconstruct": None}
    preset: dict[str, Any] = chosen(plan.get("preset"), **none, **given)
    if preset["reconstruct"] and not reconstruct:
        preset = chosen(None, **none, **given)
    return {**vars(Request()), **preset}


def shrink_command(plan: Mapping[str, Any]) -> list[str] | None:
    """Return the words of ``shrink`` for a plan, as `making_words` does."""
    if _given(plan):
        return None
    usual, layers = vars(ShrinkRequest()), plan.get("layers")
    kept = ("neurons", "heads", "experts", "target", "round", "criterion", "depth", "compensate", "propagate", "dtype")
    if isinstance(layers, list):  # one block is named twice, since a single number says how many
        layers = ",".join(map(str, layers * 2 if len(layers) == 1 else layers))
    wanted = {
        **{key: plan.get(key, usual[key]) for key in kept},
        "layers": layers,
        "of": ",".join(plan.get("of") or usual["of"]),
        **_texts(plan),
        "seed": plan.get("seed", usual["seed"]),
    }
    return ["secateur", "shrink", plan["model"]["name"], *option_words(wanted, {**usual, "of": ",".join(usual["of"])})]


def finetune_command(plan: Mapping[str, Any]) -> list[str] | None:
    """Return the words of ``finetune`` for a plan, as `making_words` does."""
    data, course, evaluate = plan["data"], plan.get("course") or {}, plan.get("evaluate")
    unknown = plan["train"] not in TRAIN or (course and parts_of(course["method"])[0][0] not in METHODS)
    if unknown or _given({"calibration": data}):
        return None
    asked: dict[str, Any] = {key: course.get(key) for key in ("sparsity", "pattern", "rounds")}
    bare = FinetuneRequest(data=None, steps=plan["steps"], **asked)  # what the other options follow from
    usual = {
        **vars(FinetuneRequest(data=None)),
        "train": bare.trained,
        "learning_rate": replace(bare, train=plan["train"]).rate,
        "method": bare.pruning.method,
        "every": bare.masked_every,
        "eval_steps": bare.evaluated_every,
    }
    seqlen = None if data["seqlen"] == TRAINING_SEQLEN else data["seqlen"]
    wanted = {
        **{key: plan[key] for key in ("train", "steps", "batch_size", "accumulate", "learning_rate", "eval_steps")},
        **{key: course.get(key, usual[key]) for key in ("initial", "schedule", "every", "samples", "method")},
        **asked,
        "data": data["source"].replace("wikitext2:train", "wikitext2"),
        "seqlen": evaluate.get("seqlen") if evaluate else seqlen,  # one option is for both texts
        "rank": usual["rank"] if plan.get("rank") is None else plan["rank"],
        "teacher": plan["teacher"]["name"] if plan.get("teacher") else None,
        "allocation": "uniform" if course.get("allocation", "uniform") == "uniform" else ALLOCATION,
        "include": tuple(course.get("include") or ()),
        "exclude": tuple(course.get("exclude") or ()),
        "gradient_checkpointing": bool(plan.get("gradient_checkpointing")),
        "seed": plan["seed"],
        "evaluate": evaluate["source"] if evaluate else None,
    }
    return ["secateur", "finetune", plan["model"]["name"], *option_words(wanted, usual)]


def rules_of(plan: Mapping[str, Any]) -> Any:
    """The allocation that a plan has, or its course: a name, or rules that were given."""
    found = allocation_found(plan)
    return found["name"] if found else (plan.get("course") or plan).get("allocation", "uniform")


def _given(plan: Mapping[str, Any]) -> bool:
    """Whether the calibration text was handed over in Python."""
    calibration = plan.get("calibration")
    return calibration is not None and calibration["source"].startswith("the given ")


def _texts(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name texts to calibrate and to evaluate on."""
    calibration = plan.get("calibration")
    evaluate = plan.get("evaluate") or {"source": None, "seqlen": calibration and calibration["seqlen"]}
    seqlen = evaluate.get("seqlen")
    wanted = {"evaluate": evaluate["source"], "seqlen": None if seqlen == DEFAULT_SEQLEN else seqlen}
    if calibration:
        wanted["calibration"] = calibration["source"].replace("wikitext2:train", "wikitext2")
        wanted["samples"] = None if calibration["samples"] == DEFAULT_SAMPLES else calibration["samples"]
        wanted["seed"] = calibration["seed"]
    return wanted


def option_words(wanted: Mapping[str, Any], default: Mapping[str, Any]) -> list[str]:
    """The flags of options that are not as by default, in the order of the defaults."""
    words = []
    for key, usual in default.items():
        value, flag = wanted.get(key, usual), key.replace("_", "-")
        if isinstance(usual, bool):
            words += [] if bool(value) == usual else [f"--{'no-' * usual}{flag}"]
            continue
        for one in value if isinstance(value, tuple) else [value]:
            words += [] if value == usual else [f"--{flag}", str(one)]
    return words

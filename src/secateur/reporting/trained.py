"""What `finetune` did, in words, and what its model was before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

# What each command has done to a model.
DID = {"prune": "pruned", "shrink": "shrunk", "finetune": "trained", "pack": "packed", "unpack": "unpacked"}


def command_of(report: Report) -> str:
    """The command whose report it is."""
    return str(report["plan"].get("command", "prune"))


def is_trained(report: Report | None) -> bool:
    """Whether a report is one of `finetune`."""
    return report is not None and command_of(report) == "finetune"


def story(report: Report) -> list[Report]:
    """Return the reports of all that was done to a model, oldest first and this one last, as far as they are recorded.

    >>> pruning = {"plan": {"method": "wanda"}}
    >>> packing = {"plan": {"command": "pack"}, "pruned": pruning}
    >>> [command_of(one) for one in story({"plan": {"command": "finetune"}, "former": packing})]
    ['prune', 'pack', 'finetune']
    """
    found = [report]
    while (before := found[0].get("former") or found[0].get("pruned")) and command_of(before) in DID:
        found.insert(0, before)
    return found


def first_model(report: Report) -> str:
    """The name of the model of which all was made, as far back as is recorded."""
    return str(story(report)[0]["plan"]["model"]["name"])


def value_format(report: Report) -> str | None:
    """How the values of a packed model are kept, if not as they were: what is packed is packed again after training."""
    found = (one["plan"]["values"] for one in reversed(story(report)) if "values" in one["plan"])
    return next(found, None)


def held_out(training: Report) -> tuple[float | None, float | None] | None:
    """Return the loss on held-out rows before training and of the checkpoint that was kept; None if unknown.

    >>> held_out({"steps": 4, "held_out": [[0, 3.0], [2, 2.5], [4, 2.0], [6, 2.25]]})
    (3.0, 2.0)
    """
    points = {step: loss for step, loss in training["held_out"]}
    if 0 not in points or len(points) < 2:
        return None
    return points[0], points.get(training["steps"], points[max(points)])


def loss_words(loss: float | None) -> str:
    """A loss for people."""
    return f"{loss:.3f}" if loss is not None and math.isfinite(loss) else "no number"


def loss_name(training: Report) -> str:
    """What was made smaller: the loss on text, or the distance from a teacher."""
    return "divergence from the teacher" if training["loss"] == "divergence" else "loss"


def remarks(report: Report) -> list[str]:
    """What must be said of how a training ended, if it did not end as was hoped."""
    plan, training, said = report["plan"], report["training"], []
    kept, of = training["steps"], plan["steps"]
    if (step := training.get("stopped")) is not None:
        said.append(f"The loss became NaN or infinite in step {step:,}; the model is that of step {kept:,} of {of:,}.")
    elif kept < of:
        said.append(f"The model is that of step {kept:,} of {of:,}, whose loss on held-out rows was lowest.")
    if not plan.get("course") and not improved(training):
        before, after = map(loss_words, held_out(training) or ())
        said.append(f"Training did not lower the {loss_name(training)} on held-out rows: {before} before, {after} now.")
    if not training["held_out_rows"]:
        said.append("The text had too few rows to hold some out, so nothing tells whether training did harm.")
    return said


def improved(training: Report) -> bool:
    """Whether training lowered the loss on held-out rows, as far as that is known."""
    before, after = held_out(training) or (1.0, 0.0)
    return after is not None and math.isfinite(after) and (before is None or not after >= before)


def zeros_words(report: Report) -> str:
    """What became of the zeros."""
    if course := report["plan"].get("course"):
        return f"pruned on the way to {report['sparsity']:.1%} by {course['method']} {course_words(course)}"
    return "every zero was kept"


def course_words(course: Report) -> str:
    """How a model was pruned while it was trained.

    >>> course_words({"rounds": None, "initial": 0.25, "every": 10, "schedule": "cubic"})
    'gradually from 25.0%, with a new mask every 10 steps, schedule cubic'
    >>> course_words({"rounds": 4, "samples": 64})
    'in 4 rounds'
    """
    if course.get("rounds") is not None:
        return f"in {course['rounds']:,} rounds"
    begin = f" from {course['initial']:.1%}" if course["initial"] else ""
    return f"gradually{begin}, with a new mask every {course['every']:,} steps, schedule {course['schedule']}"


def what_was_trained(plan: Report) -> str:
    """Which parameters were trained, in words."""
    kinds = {
        "full": "all parameters",
        "lora": f"LoRA adapters of rank {plan.get('rank')} under the mask, merged in the end",
        "bias": "biases and norms",
    }
    return kinds.get(plan["train"], str(plan["train"]))

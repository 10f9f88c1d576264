"""What a page says of how a model was made: commands and all that they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...pruning.methods import parts_of
from ..commands import making_command, rules_of
from ..pruned import allocation_found, found_words, mean_errors, reconstruction_words
from ..trained import DID, command_of, story
from . import speed
from .parts import Section
from .records import Records
from .wording import counted, digits, listing, short

# What each command did, where it is one of several.
VERBS = {**DID, "shrink": "shrank"}


def reproduce(records: Records) -> Section:
    """Everything that is needed to do it again."""
    steps = story(records.report)
    plans = [step["plan"] for step in steps]
    outputs = [*(plan["model"]["name"] for plan in plans[1:]), records.name]
    code = []
    for step, plan, output in zip(steps, plans, outputs, strict=True):
        what = "The command" if len(steps) == 1 else f"The command that {VERBS[command_of(step)]} it"
        code.append((what, making_command(plan, output) or "# made from Python, with what no command line can name"))
    for plan in plans:
        if not isinstance(rules := rules_of(plan), str):
            code.append(("allocation.yaml", json.dumps(rules, indent=1, ensure_ascii=False)))
    facts = [fact for step in steps for fact in [*_pruning(step), *_facts(step["plan"])]]
    if bench := speed.bench_of(records):
        facts.append(("Speeds measured on", f"{bench['processor']}, {counted(bench['threads'], 'thread')}"))
    return Section("reproduce", "To do it again", code=code, facts=list(dict.fromkeys(facts)))


def _pruning(step: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a pruning did: method and stages, and what came before and after them."""
    plan, facts = step["plan"], []
    if command_of(step) != "prune":
        return []
    words = [
        f"{name} ({options.replace(':', ', ')})" if options else name for name, options in parts_of(plan["method"])
    ]
    facts.append(("Method", short(", then ".join(words), 160)))
    if preset := plan.get("preset"):
        facts.append(("Preset", short(preset)))
    if found := allocation_found(plan):
        facts.append(("Allocation", found_words(found)))
    if how := plan.get("reconstruct"):
        errors = mean_errors(step.get("blocks") or ())
        gained = f"; mean held-out error {digits(errors[0])} before and {digits(errors[1])} after" if errors else ""
        facts.append(("Reconstruction", reconstruction_words(how) + gained))
    return facts


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, calibration, facts = plan["model"], plan.get("calibration"), []
    facts.append(("Model", model["name"]))
    facts.append(("Digest of the model (SHA-256)", model.get("digest") or "none: the model was in memory"))
    if teacher := plan.get("teacher"):
        facts.append(("Teacher", teacher["name"]))
        facts.append(("Digest of the teacher (SHA-256)", teacher.get("digest") or "none"))
    if calibration:
        facts += _text("Calibration", "calibration", calibration)
    elif "method" in plan:
        facts.append(("Calibration", "none: the method needs none"))
    elif "criterion" in plan:
        facts.append(("Calibration", "none: nothing was observed"))
    if data := plan.get("data"):
        facts += _text("Training text", "training", data)
    if "threads" in plan:
        facts.append(("Computed with", f"{counted(plan['threads'], 'thread')}, {plan.get('device') or 'cpu'}"))
    if plan.get("micro_batch_tokens"):
        facts.append(("Tokens at once", f"{plan['micro_batch_tokens']:,}"))
    software = plan.get("software") or {}
    facts.append(("Software", listing(f"{name} {version}" for name, version in software.items()) or "not recorded"))
    return facts


def _text(title: str, of: str, tokens: Mapping[str, Any]) -> list[tuple[str, str]]:
    said = (
        f"{tokens['samples']} sequences of {tokens['seqlen']} tokens, {tokens['tokens']:,} in all, of "
        f"{tokens['source']}; seed {tokens['seed']}"
    )
    return [(title, said), (f"Digest of the {of} tokens", tokens.get("digest") or "none")]

"""What a page says of how a model was made: commands and all that they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..commands import making_command
from ..removed import is_shrunk
from . import speed
from .parts import Section
from .records import Records
from .wording import counted, listing


def reproduce(records: Records, run: Mapping[str, Any] | None) -> Section:
    """Everything that is needed to do it again."""
    plan = records.report["plan"]
    packing = "command" in plan and run is not None
    did = "shrank" if is_shrunk(run) else "pruned"
    makers = [("The command that packed it" if packing else "The command", making_command(plan, records.name))]
    plans = [plan]
    if run and run["plan"] is not plan:
        makers.insert(0, (f"The command that {did} it", making_command(run["plan"], plan["model"]["name"])))
        plans.insert(0, run["plan"])
    code = [(what, line or "# made from Python, with what no command line can name") for what, line in makers]
    for one in plans:
        if one.get("allocation", "uniform") != "uniform":
            code.append(("allocation.yaml", json.dumps(one["allocation"], indent=1, ensure_ascii=False)))
    facts = [fact for one in plans for fact in _facts(one)]
    if bench := speed.bench_of(records):
        facts.append(("Speeds measured on", f"{bench['processor']}, {counted(bench['threads'], 'thread')}"))
    return Section("reproduce", "To do it again", code=code, facts=list(dict.fromkeys(facts)))


def _facts(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, calibration, facts = plan["model"], plan.get("calibration"), []
    facts.append(("Model", model["name"]))
    facts.append(("Digest of the model (SHA-256)", model.get("digest") or "none: the model was in memory"))
    if calibration:
        facts.append(
            (
                "Calibration",
                f"{calibration['samples']} sequences of {calibration['seqlen']} tokens, {calibration['tokens']:,} in "
                f"all, of {calibration['source']}; seed {calibration['seed']}",
            )
        )
        facts.append(("Digest of the calibration tokens", calibration.get("digest") or "none"))
    elif "method" in plan:
        facts.append(("Calibration", "none: the method needs none"))
    elif "criterion" in plan:
        facts.append(("Calibration", "none: nothing was observed"))
    if "threads" in plan:
        facts.append(("Computed with", f"{counted(plan['threads'], 'thread')}, {plan.get('device') or 'cpu'}"))
    if plan.get("micro_batch_tokens"):
        facts.append(("Tokens at once", f"{plan['micro_batch_tokens']:,}"))
    software = plan.get("software") or {}
    facts.append(("Software", listing(f"{name} {version}" for name, version in software.items()) or "not recorded"))
    return facts

"""What a model is worth, before and after: perplexity, fidelity, tasks, generations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..trained import is_trained
from ..words import number, windows
from .charts import Axis, Series, by_block_chart, intervals
from .parts import Card, Cell, Picture, Sample, Section, Table, by_block, numeric, plain, words
from .records import Records
from .wording import change, counted, course, difference, digits, listing, measuring, percent, points, ratio, short

Evaluation = Mapping[str, Any]
Pair = tuple[Evaluation | None, Evaluation | None]

perplexity = numeric(number)


def latest(records: Records, key: str) -> Evaluation:
    """The last recorded evaluation that has something to say on a key; empty if none has."""
    return next((line for line in reversed(records.evaluations) if line.get(key)), {})


def measured(evaluation: Evaluation | None) -> bool:
    """Whether a perplexity was measured, be it one beyond measure."""
    return evaluation is not None and evaluation.get("text") is not None


def perplexities(records: Records) -> tuple[Pair, str]:
    """The model's perplexity before and after, on the same text, and a word on what it is of.

    A finished run's own come first; of a packed model its own, then that of the pruned one that was packed.
    """
    own = records.report.get("evaluation")
    line = latest(records, "text")
    if own:
        return (own["before"], own["after"]), ""
    if line:
        against = line.get("against")
        return ({**line, **against} if against and "loss" in against else None, line), ""
    made = records.report.get("pruned") or {}
    if former := made.get("evaluation"):
        did = "trained" if is_trained(made) else "pruned"
        return (former["before"], former["after"]), f"of the {did} model, before it was packed"
    return (None, None), ""


def perplexity_card(records: Records, dense: str) -> Card:
    """Perplexity before and after."""
    (before, after), of = perplexities(records)
    title = "Perplexity"
    if after is None and before is not None:
        model = "model before training" if is_trained(records.report) else "dense model"
        return Card(title, number(before.get("perplexity")), f"of the {model}; {windows(before)}")
    if after is None:
        return Card(title, "", missing=measuring("eval", records.name, "--against", dense))
    value = number(after.get("perplexity"))
    notes = [of, windows(after)]
    if before:
        value = f"{number(before.get('perplexity'))} → {value}"
        times = ratio(after.get("perplexity"), before.get("perplexity"))
        notes.insert(0, f"×{digits(times)}" if times else "")
    return Card(title, value, "; ".join(filter(None, notes)))


def fidelity_card(records: Records, dense: str) -> Card:
    """How far the model's predictions are those of the dense one."""
    found = latest(records, "fidelity").get("fidelity")
    if not found:
        return Card("Same likeliest token", "", missing=measuring("eval", records.name, "--against", dense))
    note = f"as the dense model; mean KL divergence {digits(found.get('kl'))} nats per prediction"
    return Card("Same likeliest token", percent(found.get("top1"), 1), note)


def tasks_card(records: Records, dense: str) -> Card:
    """Mean accuracy over tasks."""
    line = latest(records, "tasks")
    if not line:
        missing = measuring("eval", records.name, "--tasks", "arc_easy,hellaswag", "--against", dense)
        return Card("Zero-shot accuracy", "", missing=missing)
    after = line["tasks"].get("mean")
    before = ((line.get("against") or {}).get("tasks") or {}).get("mean")
    names = listing(result["task"] for result in line["tasks"]["results"])
    note = f"unweighted mean over {short(names, 120)}"
    value = percent(after, 1) if after is not None else "no mean"
    if before is not None and after is not None:
        return Card("Zero-shot accuracy", f"{percent(before, 1)} → {value}", f"{points(after - before)}; {note}")
    return Card("Zero-shot accuracy", value, note)


def perplexity_table(records: Records) -> list[Table]:
    """Loss and perplexity before and after, and their differences."""
    (before, after), of = perplexities(records)
    if not (measured(before) and measured(after)) or before is None or after is None:
        return []
    rows = []
    for what, key in (("Loss, nats per prediction", "loss"), ("Perplexity", "perplexity")):
        old, new = before.get(key), after.get(key)
        added, times = difference(new, old), ratio(new, old)
        form = perplexity if key == "perplexity" else plain
        cells = [
            Cell("beyond measure") if value is None and key == "perplexity" else form(value) for value in (old, new)
        ]
        rows.append([Cell(what), *cells, Cell(change(added, ".4g"), added), plain(times)])
    caption = f"Quality before and after{', ' + of if of else ''}: {windows(after)}"
    return [Table(caption, ["", "Before", "After", "Difference", "Ratio"], rows)]


def fidelity_picture(records: Records) -> list[Picture]:
    """The distance between pruned and dense hidden states after each block."""
    blocks = (latest(records, "fidelity").get("fidelity") or {}).get("blocks") or ()
    values = {index: value for index, value in enumerate(blocks) if value is not None}
    if not values:
        return []
    title, axis = "Distance from the dense model after each block", Axis("|dense − model| / |dense|, hidden states")
    says = course(values, "The relative distance of hidden states")
    svg = by_block_chart("distance", title, says, values, axis)
    table = by_block("Relative distance of hidden states", [axis.title], ((b, [plain(v)]) for b, v in values.items()))
    return [Picture("distance", title, says, svg, table)]


def accuracy(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A task's accuracy and its standard error, or of another metric where it has no accuracy."""
    metrics = result["metrics"]
    found = metrics.get("acc") or next(iter(metrics.values()), None)
    return found if found and found.get("value") is not None else None


def tasks_picture(records: Records) -> list[Picture]:
    """Each task before and after, with standard errors."""
    line = latest(records, "tasks")
    after = {result["task"]: result for result in line["tasks"]["results"]} if line else {}
    old = ((line.get("against") or {}).get("tasks") or {}).get("results") or ()
    before = {result["task"]: result for result in old}
    shown = [task for task in after if accuracy(after[task])]
    if not shown:
        return []
    many = [("before", before, 1), ("after", after, 0)] if before else [("after", after, 0)]
    series = [Series(label, colour, mark=colour, points=_points(results, shown)) for label, results, colour in many]
    title = "Zero-shot tasks before and after" if before else "Zero-shot tasks"
    says = _tasks_in_words(before, after, shown)
    svg = intervals("tasks", title, says, shown, [s for s in series if s.points], Axis("Accuracy", percent=True))
    return [Picture("tasks", title, says, svg, tasks_table(before, after))]


def _points(results: Mapping[str, Any], tasks: Sequence[str]) -> list[tuple[float, float, float, float]]:
    found = []
    for row, task in enumerate(tasks):
        if metric := accuracy(results[task]) if task in results else None:
            error = max(0.0, metric.get("stderr") or 0.0)
            found.append((metric["value"], float(row), error, error))
    return found


def _tasks_in_words(before: Mapping[str, Any], after: Mapping[str, Any], tasks: Sequence[str]) -> str:
    said = []
    for task in tasks:
        new, old = accuracy(after[task]), accuracy(before[task]) if task in before else None
        if new and old:
            said.append(f"{short(task)} from {percent(old['value'], 1)} to {percent(new['value'], 1)}")
        elif new:
            said.append(f"{short(task)} {percent(new['value'], 1)}")
    return f"Accuracy with one standard error to each side: {listing(said)}."


def tasks_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Every metric of every task, with standard errors; the difference's is that of independent samples."""
    rows = []
    for task, result in after.items():
        for metric, new in result["metrics"].items():
            old = before.get(task, {}).get("metrics", {}).get(metric) or {}
            gap = difference(new.get("value"), old.get("value"))
            errors = [m["stderr"] for m in (old, new) if m.get("stderr") is not None]
            error = math.hypot(*errors) if gap is not None and len(errors) == 2 else None
            cells = [_with_error(old), _with_error(new), Cell(points(gap), gap), Cell(_points_of(error), error)]
            about = f"{task} ({counted(result['shots'], 'shot') if result.get('shots') is not None else metric})"
            rows.append([Cell(about), *words(metric, result.get("questions")), *cells])
    head = ["Task", "Metric", "Questions", "Before ± s.e.", "After ± s.e.", "Difference", "Its s.e."]
    caption = (
        "Tasks. The difference's standard error is that of independent samples; both models answered the same "
        "questions, so it is rather smaller"
    )
    return Table(caption, head, rows)


def _with_error(metric: Mapping[str, Any]) -> Cell:
    if metric.get("value") is None:
        return Cell("")
    error = f" ± {percent(metric['stderr'], 2)}" if metric.get("stderr") is not None else ""
    return Cell(percent(metric["value"]) + error, metric["value"])


def _points_of(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.1f} points"


def samples(records: Records, dense: str) -> list[Sample]:
    """What the model writes after each prompt, beside what the dense one writes."""
    line = latest(records, "generations")
    against = line.get("against") or {}
    before = {one["prompt"]: one for one in against.get("generations") or ()}
    found = []
    for one in line.get("generations") or ():
        versions = [version(records.name, one)]
        if one["prompt"] in before:
            versions.insert(0, version(against.get("model") or dense, before[one["prompt"]]))
        found.append(Sample(one["prompt"], versions))
    return found


def version(name: str, generation: Mapping[str, Any]) -> tuple[str, str, str]:
    """One model's continuation."""
    repeated = generation.get("repetition")
    return name, generation["continuation"].strip(), "" if repeated is None else f"{percent(repeated, 0)} repeated"


def history(records: Records) -> Section:
    """All recorded evaluations, oldest first."""
    rows = []
    for line in records.evaluations:
        said, value = "", None
        if measured(line):
            said, value = windows(line), line.get("perplexity")
        fidelity, tasks, bench = line.get("fidelity") or {}, line.get("tasks") or {}, line.get("bench")
        more = [counted(len(tasks["results"]), "task")] if tasks else []
        more += ["speed and memory"] if bench else []
        more += ["generations"] if line.get("generations") else []
        shown = Cell(number(value), value) if measured(line) else Cell("")
        version_ = (line.get("software") or {}).get("secateur")
        when = str(line.get("date") or "no date").replace("T", " ").replace("+00:00", " UTC")
        mean = tasks.get("mean")
        cells = [shown, plain(fidelity.get("kl")), Cell("" if mean is None else percent(mean, 1), mean)]
        rows.append([Cell(when), Cell("; ".join(filter(None, [said, *more]))), *cells, *words(version_)])
    head = ["Date", "What was measured", "Perplexity", "KL to dense, nats", "Task mean", "Secateur"]
    tables = [Table("Every recorded evaluation, oldest first", head, rows)] if rows else []
    return Section("history", "Evaluations so far", tables=tables)

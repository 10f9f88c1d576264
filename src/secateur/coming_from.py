"""Translate the flags of the Wanda and SparseGPT research scripts into a Secateur command.

Who knows `main.py --prune_method wanda --sparsity_ratio 0.5` or `llama.py MODEL c4 --prunen 2 --prunem 4`
types those flags here too. The same as tables: docs/coming-from.md.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

WANDA, SPARSEGPT = "locuslab/wanda", "IST-DASLab/sparsegpt"  # repositories on github.com
CHOOSE = "choose matrices by --include or --exclude"


class Flag(NamedTuple):
    """A foreign flag: whose it is (empty: both have it), and why it is not carried over (empty: it is)."""

    home: str
    lost: str = ""
    takes_value: bool = True
    neutral: str = ""  # the value under which the flag changes nothing


FLAGS = {  # spelled with hyphens; typed underscores are read as such
    "--model": Flag(WANDA),
    "--prune-method": Flag(WANDA),
    "--sparsity-ratio": Flag(WANDA),
    "--sparsity-type": Flag(WANDA, neutral="unstructured"),
    "--save-model": Flag(WANDA),
    "--cache-dir": Flag(WANDA, "set the environment variable HF_HOME"),
    "--use-variant": Flag(WANDA, "under wanda all rows get the same sparsity", takes_value=False),
    "--eval-zero-shot": Flag(WANDA, "pruning runs no tasks", takes_value=False),
    "--nsamples": Flag(""),
    "--save": Flag(""),
    "--prunen": Flag(SPARSEGPT, neutral="0"),
    "--prunem": Flag(SPARSEGPT, neutral="0"),
    "--percdamp": Flag(SPARSEGPT, neutral="0.01"),
    "--blocksize": Flag(SPARSEGPT, neutral="128"),
    "--gmp": Flag(SPARSEGPT, takes_value=False),
    "--prune-only": Flag(SPARSEGPT),
    "--invert": Flag(SPARSEGPT, CHOOSE, takes_value=False),
    "--minlayer": Flag(SPARSEGPT, CHOOSE, neutral="-1"),
    "--maxlayer": Flag(SPARSEGPT, CHOOSE, neutral="1000"),
    "--wbits": Flag(SPARSEGPT, "pruning does not quantise", neutral="16"),
    "--true-sequential": Flag(SPARSEGPT, takes_value=False),
    "--log-wandb": Flag(SPARSEGPT, "the record is secateur.json in the output", takes_value=False),
}
ORDER = ("--method", "--sparsity", "--pattern", "--calibration", "--samples", "--seqlen", "--seed")
SWITCHES = (
    "--dry-run", "--overwrite", "--no-resume", "--trust-remote-code", "--json", "--debug", "--help", "--quiet",
    "--verbose",
)  # fmt: skip
OTHER_COMMANDS = ("eval", "inspect", "generate", "pack", "unpack", "bench", "compare", "shrink", "finetune", "report")


def translate(arguments: Sequence[str]) -> str | None:
    """Return one paragraph that ends in the equal `secateur prune` command, or None without a foreign flag.

    Only flags that Secateur does not have count as foreign; its own among them are kept.

    >>> translate(["--model", "gpt2", "--prune_method", "wanda", "--save=out"])
    '--model, --prune_method, --save: flags of locuslab/wanda. In Secateur: secateur prune gpt2 out --method wanda'
    """
    words, own, foreign, typed = _read(arguments)
    if not typed or (words and words[0] in OTHER_COMMANDS):
        return None
    homes = {FLAGS[flag].home for flag in typed} - {""}
    if text := foreign.get("--prune-only", ""):
        own.append(("--exclude" if "--invert" in foreign else "--include", re.escape(text)))
        foreign.pop("--invert", "")
    lost = {typed[flag]: FLAGS[flag].lost for flag in foreign if FLAGS[flag].lost}
    model = foreign.get("--model") or (words.pop(0) if words else "MODEL")
    options = [pair for pair in own if pair[0] not in ("--method", "--sparsity")]
    if words and words[0] in ("wikitext2", "c4", "ptb"):
        homes.add(SPARSEGPT)
        if (text := words.pop(0)) == "ptb":
            lost[text] = "give the text itself as --calibration FILE"
        else:
            options.append(("--calibration", text))
    output = foreign.get("--save-model") or (words[0] if words else foreign.get("--save", "OUTPUT"))
    if method := _method(dict(own).get("--method", ""), foreign, homes, lost):
        options.append(("--method", method))
    options.append(_target(foreign.get("--sparsity-ratio") or dict(own).get("--sparsity", ""), foreign, lost))
    if "--true-sequential" in foreign:
        options.append(("--propagate", "sequential"))
    if "--nsamples" in foreign:
        options.append(("--samples", foreign["--nsamples"]))
    options.sort(key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER))
    command = shlex.join(["secateur", "prune", model, output, *(part for pair in options for part in pair if part)])
    whose = " and ".join(sorted(homes or {WANDA, SPARSEGPT}, reverse=True))
    notes = f" Not carried over: {'; '.join(f'{name} ({why})' for name, why in lost.items())}." if lost else ""
    return f"{', '.join(typed.values())}: flags of {whose}.{notes} In Secateur: {command}"


def _read(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], dict[str, str], dict[str, str]]:
    """Split into words, own options, foreign flags that change something, and all foreign flags as typed."""
    words, own, foreign, typed = [], [], {}, {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            words.append(token)
            continue
        name, equals, value = token.partition("=")
        flag = name.replace("_", "-")
        known = FLAGS.get(flag)
        takes_value = known.takes_value if known else flag.startswith("--") and flag not in SWITCHES
        if takes_value and not equals and rest and (known or not rest[0].startswith("-")):
            value = rest.pop(0)
        if known is None:
            own.append((name, value))
            continue
        typed[flag] = name
        if not (known.neutral and _equal(value, known.neutral)):
            foreign[flag] = value or ("VALUE" if takes_value else "")
    while words and (words[0] in ("python", "python3", "secateur", "prune") or words[0].endswith(".py")):
        words.pop(0)
    return words, own, foreign, typed


def _method(own: str, foreign: dict[str, str], homes: set[str], lost: dict[str, str]) -> str:
    """Choose the method; what cannot be said of it is added to `lost`."""
    method = own or ("magnitude" if "--gmp" in foreign else foreign.get("--prune-method", ""))
    if method.startswith("ablate"):
        lost[f"--prune_method {method}"] = "another mask under SparseGPT's update; sparsegpt comes nearest"
        method = "sparsegpt"
    method = method or ("sparsegpt" if SPARSEGPT in homes else "")
    for flag, option in (("--percdamp", "damping"), ("--blocksize", "block_size")):
        if flag in foreign and method.startswith("sparsegpt"):
            method += f":{option}={foreign[flag]}"
        elif flag in foreign:
            lost[flag] = "an option of sparsegpt"
    return method


def _target(sparsity: str, foreign: dict[str, str], lost: dict[str, str]) -> tuple[str, str]:
    """Both scripts write N:M for N pruned of M, Secateur for N kept."""
    text = foreign.get("--sparsity-type") or f"{foreign.get('--prunen', 0)}:{foreign.get('--prunem', 0)}"
    found = re.fullmatch(r"(\d+):(\d+)", text)
    pruned, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < pruned < m:
        return ("--sparsity", sparsity) if sparsity else ("", "")
    if pruned != m - pruned:
        lost[f"N:M as {text}"] = f"that is {pruned} pruned of {m}; Secateur writes what is kept, {m - pruned}:{m}"
    if sparsity and not _equal(sparsity, str(pruned / m)):
        lost[f"sparsity {sparsity}"] = f"{m - pruned}:{m} is a sparsity of {pruned / m:g}"
    return "--pattern", f"{m - pruned}:{m}"


def _equal(a: str, b: str) -> bool:
    try:
        return abs(float(a) - float(b)) < 1e-9
    except ValueError:
        return a == b

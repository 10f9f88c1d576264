"""What stands for an allocation's rules: a name, a file, or the rules themselves."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from ..errors import OptionError, nearest
from ..pruning.allocation import Rules

FOUND = ("linear", "owl", "alpha")  # names whose rules are found for each model
CALIBRATED = ("linear", "owl")  # those that are found on calibration tokens
ALLOCATIONS = ("uniform", *FOUND)


def allocation_name(allocation: str | Rules) -> str | None:
    """Return the name of an allocation whose rules are still to be found; None for any other."""
    return allocation if isinstance(allocation, str) and allocation in FOUND else None


def allocation_rules(allocation: str | Rules) -> Rules | None:
    """Return the rules of an allocation: None for ``uniform``, the contents of a YAML or JSON file.

    Raises:
        OptionError: no such allocation or file, or the file holds no rules.
    """
    if not isinstance(allocation, str):
        return allocation
    if allocation == "uniform":
        return None
    if allocation in ALLOCATIONS:
        raise OptionError(f"allocation {allocation!r}: only prune finds it; give a file of keys and sparsities here")
    path = Path(os.path.expanduser(allocation))
    if not os.path.isfile(path):  # False for a name that no file can have
        raise OptionError(
            f"unknown allocation {allocation!r}: neither a file nor a name; {nearest(allocation, ALLOCATIONS)}"
        )
    try:
        rules = yaml.load(path.read_text("utf-8-sig"), Loader=yaml.BaseLoader)  # strings: plain YAML reads 2:4 as 124
    except OSError as error:
        raise OptionError(f"{allocation}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        raise OptionError(f"{allocation}: is not YAML") from None
    if not isinstance(rules, (dict, list)) or not rules:
        raise OptionError(
            f"{allocation}: holds neither a table of keys and sparsities nor a list of one number per block"
        )
    return rules

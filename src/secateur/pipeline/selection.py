"""Which matrices the user's expressions and rules speak of, and which parts of a model are never pruned."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

from ..errors import OptionError, nearest
from ..pruning.allocation import MatrixInfo, Rules

log = logging.getLogger("secateur")


def select(
    matrices: list[MatrixInfo], include: list[str], exclude: list[str], others: Sequence[str] = ()
) -> list[MatrixInfo]:
    """Keep the matrices in whose names an `include` expression is found and no `exclude` expression is.

    Args:
        matrices: all of them.
        include: regular expressions; none keeps all.
        exclude: regular expressions; what fits only `others` is accepted, and said to be needless.
        others: names of the model's modules that are never pruned, such as ``lm_head``.

    Raises:
        OptionError: an expression is found in no name, or nothing is left.
    """
    if not matrices:
        raise OptionError("the model has no blocks, or no matrix in them that can be pruned")
    for option, texts in (("include", include), ("exclude", exclude)):
        for text in texts:
            if any(re.search(text, m.name) for m in matrices):
                continue
            never = next((name for name in others if re.search(text, name)), None)
            if never is None:
                leaves = sorted({m.name.rsplit(".", 1)[-1] for m in matrices})
                raise OptionError(f"{option} {text!r} is found in no matrix name; {nearest(text, leaves)}")
            if option == "include":
                raise OptionError(f"include {text!r}: {never} is never pruned; leave it out")
            log.info("exclude %r: %s is never pruned anyway", text, never)
    kept = [m for m in matrices if not include or any(re.search(text, m.name) for text in include)]
    kept = [m for m in kept if not any(re.search(text, m.name) for text in exclude)]
    if not kept:
        raise OptionError("include and exclude leave no matrix to prune")
    return kept


def of_matrices(rules: Rules | None, matrices: list[MatrixInfo], others: Sequence[str]) -> Rules | None:
    """Leave out the rules that give a sparsity of 0 to what is never pruned."""
    if not isinstance(rules, Mapping):
        return rules
    needless = [
        key
        for key, value in rules.items()
        if str(value) in ("0", "0.0") and str(key) in others and str(key) not in {m.name for m in matrices}
    ]
    for key in needless:
        log.info("allocation %r: is never pruned anyway", key)
    return {key: value for key, value in rules.items() if key not in needless}

"""The metadata at the head of a model card, as Hugging Face reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...models.source import SMOLLM2
from ...pruning import METHODS
from ...pruning.methods import parts_of
from ..removed import is_shrunk
from ..trained import is_trained, story, value_format
from .text import plain

HUB_ID = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?"
CARRIED = ("language", "license", "license_name", "license_link", "pipeline_tag")  # from the source's card


def front_matter(card: str) -> dict[str, Any]:
    """Return the metadata at the head of a card; empty if there is none that can be read."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", card, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # a date of the 31st of February is a ValueError
        return {}
    return data if isinstance(data, dict) else {}


def hub_id(name: str) -> str | None:
    """Return the name if a model by it comes from the hub, as `secateur.models.source.locate` decides, else None."""
    if name == SMOLLM2 or name.endswith(".gguf") or len(name) > 96 or not re.fullmatch(HUB_ID, name):
        return None
    return None if Path(name).exists() else name


def metadata(report: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """Return the head of a card, of its report and the metadata of its source."""
    pruned, plan = report["pruned"], report["plan"]
    base = report["base_model"]
    shrunk, rounded = is_shrunk(pruned), plan.get("values") or (report["packed"] and value_format(pruned or report))
    method = "" if shrunk or not pruned else _method(pruned)
    tags = ["pruned"] if pruned else []
    if not shrunk and (pruned or not plan.get("values")):  # rounding alone packs a dense model too
        tags.append("sparse")
    tags += ["secateur", *([method] if method in METHODS else [])]
    data = {"base_model": base}
    if base and (rounded or is_trained(pruned)):  # the hub knows finetune, adapter, merge, quantized; but no pruning
        data["base_model_relation"] = "quantized" if rounded else "finetune"
    data |= {key: carried(source.get(key)) for key in CARRIED}
    data |= {"library_name": "transformers", "tags": tags}
    kept = {key: value for key, value in data.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=10**6)}---"


def _method(report: Mapping[str, Any]) -> str:
    """The last method by which weights were chosen, in one shot or in the course of training."""
    plans = [one["plan"].get("course") or one["plan"] for one in reversed(story(report))]
    return next((parts_of(str(plan["method"]))[0][0] for plan in plans if "method" in plan), "")


def carried(value: Any, pattern: str = ".+") -> Any:
    """Return a text or a list of texts as a card may carry them on; YAML reads the language of Norway as false."""
    values = ["no" if one is False else one for one in (value if isinstance(value, list) else [value])]
    texts = [text for one in values if isinstance(one, str) and re.fullmatch(pattern, text := plain(one))]
    return texts if isinstance(value, list) else next(iter(texts), None)

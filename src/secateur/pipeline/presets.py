"""Presets: which method, reconstruction and allocation for how much patience (docs/quality.md)."""

from __future__ import annotations

from typing import Any

from ..errors import OptionError, nearest
from ..pruning import Method, parse_pattern, updated
from ..pruning.allocation import MOST, Rules, check_sparsity
from ..pruning.methods import parts_of
from .reconstruct import Reconstruction

DEFAULT_METHOD = "wanda+pcg"
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": DEFAULT_METHOD},
    "balanced": {"method": "alps"},
    "best": {"method": "alps", "reconstruct": True},
}
MUCH = 0.6  # sparsity from which `balanced` allocates: below, no allocation helps; before reconstruction it harms
ALLOCATION = "linear"


def chosen(
    preset: str | None,
    *,
    method: str | Method | None,
    update: str | None,
    allocation: str | Rules | None,
    reconstruct: bool | Reconstruction | None,
    sparsity: float | None,
    pattern: str | None,
) -> dict[str, Any]:
    """Return what a `Request` is asked for: what the user gave, and for the rest what the preset says.

    Raises:
        OptionError: no such preset.
    """
    if preset is not None and preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}: {nearest(preset, PRESETS)}")
    wished = {"method": DEFAULT_METHOD, "reconstruct": False, "allocation": "uniform", **PRESETS.get(preset or "", {})}
    if preset == "balanced" and not reconstruct and MUCH <= check_sparsity(sparsity or 0.0, "sparsity") <= MOST:
        free = not pattern or parse_pattern(pattern).fixed_sparsity is None
        wished["allocation"] = ALLOCATION if free else "uniform"
    if update is not None:
        wished["method"] = parts_of(wished["method"])[0][0]  # the stages asked for stand in place of its own
    given = {"method": method, "reconstruct": reconstruct, "allocation": allocation}
    wished |= {name: value for name, value in given.items() if value is not None}
    return {**wished, "method": updated(wished["method"], update), "preset": preset}

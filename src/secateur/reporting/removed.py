"""What `shrink` removed, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..shrinking.config import EXPERTS, WIDTHS

# What the values of a config count that `shrink` makes smaller.
NOUNS = {
    **dict.fromkeys(WIDTHS, "neurons in each MLP"),
    "moe_intermediate_size": "neurons in each expert",
    "shared_expert_intermediate_size": "neurons in each shared expert",
    **dict.fromkeys(EXPERTS, "experts in each mixture"),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), "attention heads in each block"),
    "num_key_value_heads": "heads of keys and values in each block",
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), "blocks"),
}


def is_shrunk(report: Mapping[str, Any] | None) -> bool:
    """Whether a report is one of `shrink`."""
    return report is not None and report["plan"].get("command") == "shrink"


def removed_share(parameters: Mapping[str, Any], of: str = "blocks_") -> float:
    """Which fraction of the blocks' parameters was removed, or of all (`of` empty)."""
    before = parameters[f"{of}before"]
    return 1 - parameters[f"{of}after"] / before if before else 0.0


def what_is_left(config: Mapping[str, Any]) -> list[str]:
    """What the new config counts, in words.

    >>> what_is_left({"intermediate_size": [1536, 1152], "n_inner": [None, 96], "layer_types": [["a", "b"], ["a"]]})
    ['1,152 neurons in each MLP instead of 1,536', '96 neurons in each MLP']
    """
    found = []
    for name, (old, new) in config.items():
        if name in NOUNS and isinstance(new, int):
            found.append(f"{new:,} {NOUNS[name]}" + (f" instead of {old:,}" if isinstance(old, int) else ""))
    return found


def chosen_blocks(plan: Mapping[str, Any]) -> str:
    """How the blocks that went were chosen."""
    if isinstance(plan.get("layers"), list):
        return "named by the user"
    ways = {
        "kl": "one after the other, each time the one without which predictions change least",
        "influence": "those that change the hidden state least",
        "random": "by chance",
    }
    return ways.get(plan["depth"], f"by {plan['depth']}")

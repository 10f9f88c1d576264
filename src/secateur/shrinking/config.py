"""What a smaller model's config.json says.

The names below are all that is known of families. Whether a config with new values makes the model that is wanted
is found out by making that model, without weights, and looking at its shapes (`cut`), and then by running it (`proof`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, OptionError

WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    "intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size", "n_inner", "ffn_dim",
    "ffn_hidden_size", "dff",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Heads that predict further tokens, which transformers does not run: their tensors, and what counts their layers.
PREDICTOR = re.compile(r"(^|[._])(mtp|nextn)", re.IGNORECASE)
CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k")  # experts of one token
# What says something of layers by their numbers: lists of them, and how many at the beginning.
NUMBERS = ("mlp_only_layers", "attn_layer_indices", "moe_layers", "ple_layer_ids", "full_attn_idxs")
FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "n_dense_layers")


class Config:
    """A model's config.json, and what transformers makes of it."""

    def __init__(self, directory: Path, parsed: Any, kinds: Sequence[object] = ()) -> None:
        """Take the file of a directory, the `PretrainedConfig` that was read from it, and the kind of each block."""
        self.parsed, self.kinds = parsed.get_text_config(), kinds
        self.text: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.text.pop("quantization_config", None)  # what was packed is written dense

    def get(self, name: str) -> Any:
        """A value as transformers understands it, computed where the file has none; None if layers differ in it."""
        try:
            return getattr(self.parsed, name, None)
        except Exception:  # transformers' own, which is no AttributeError
            return None

    @property
    def kind(self) -> str:
        """The family's name."""
        return str(self.parsed.model_type)

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return int(self.get("num_hidden_layers"))

    def changed(self, **values: Any) -> dict[str, Any]:
        """Return the file's contents with other values, by the names that the family gives them."""
        names = getattr(self.parsed, "attribute_map", {})
        new = dict(self.text)
        for name in filter(counts_predictors, new):  # which nobody cut
            new[name] = 0
        for name, value in values.items():
            own = names.get(name, name)
            for key in {name, own} & new.keys() or {own}:  # other engines read the key that the file has
                new[key] = value
        return new

    def narrower(self, fraction: float, widths: Collection[int], multiple: int) -> dict[str, int]:
        """Return new values for the widths of the family's MLPs.

        Args:
            fraction: of the neurons, that goes.
            widths: that the model's MLPs have.
            multiple: new widths are multiples of this.

        Raises:
            OptionError: the fraction leaves nothing, or everything.
            ModelError: the config has no width.
        """
        found = {name: self.get(name) for name in WIDTHS if isinstance(self.get(name), int)}
        absent = [name for name in WIDTHS if name in vars(self.parsed) and self.get(name) is None]
        if not set(found.values()) & set(widths) and absent and len(set(widths)) == 1:
            found = {absent[0]: next(iter(widths))}  # GPT-2's n_inner, four times the hidden size if it is not said
        found = {name: width for name, width in found.items() if width in widths}
        if not found:
            raise ModelError(f"{self.kind}: its config has no width of its MLPs, so no neurons can be removed")
        return {name: rounded(width, fraction, multiple, name) for name, width in found.items()}

    def fewer_heads(self, left: int) -> dict[str, int]:
        """Return new values for `left` groups of heads."""
        heads, groups = self.heads
        values = {"num_attention_heads": heads // groups * left, "head_dim": self.head_width}
        return values | ({"num_key_value_heads": left} if self.get("num_key_value_heads") is not None else {})

    @property
    def heads(self) -> tuple[int, int]:
        """How many heads, and groups of heads with the same keys and values, there are."""
        heads = self.get("num_attention_heads")
        groups = self.get("num_key_value_heads") or heads
        if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
            raise ModelError(f"{self.kind}: its config does not tell how many heads it has, so none can be removed")
        return heads, groups

    @property
    def head_width(self) -> int:
        """Columns of one head."""
        return int(self.get("head_dim") or self.get("hidden_size") // self.heads[0])

    @property
    def experts(self) -> tuple[str, int]:
        """The name and value of how many experts a layer has.

        Raises:
            ModelError: there are none.
        """
        for name in EXPERTS:
            if isinstance(self.get(name), int) and self.get(name) > 1:
                return name, self.get(name)
        raise ModelError(f"{self.kind}: its config tells no number of experts, so none can be removed")

    def fewer_experts(self, fraction: float) -> dict[str, int]:
        """Return new values for the number of experts.

        Raises:
            OptionError: the fraction leaves nothing, everything, or fewer experts than a token takes.
        """
        name, count = self.experts
        left = rounded(count, fraction, 1, "experts")
        taken = next((self.get(key) for key in CHOSEN if isinstance(self.get(key), int)), 1)
        if left < taken:
            raise OptionError(
                f"experts {fraction:g}: leaves {left} of {count}, and each token takes {taken}; "
                f"{1 - taken / count:.4g} is the most"
            )
        return {name: left}

    def fewer_layers(self, removed: Collection[int]) -> dict[str, Any]:
        """Return new values for all that counts or lists layers."""
        kept = [index for index in range(self.layers) if index not in removed]
        values: dict[str, Any] = {"num_hidden_layers": len(kept)}
        for name, value in self.parsed.to_dict().items():
            if name in FIRST and isinstance(value, int):
                values[name] = sum(index < value for index in kept)
            elif name in NUMBERS and isinstance(value, list):
                values[name] = [place for place, index in enumerate(kept) if index in value]
            elif self._of_each_layer(name, value):
                values[name] = [value[index] for index in kept]
        return values

    def _of_each_layer(self, name: str, value: Any) -> bool:
        named = "layer" in name or name.endswith(("_types", "_pattern", "_rates"))
        return named and isinstance(value, (list, tuple)) and len(value) == self.layers

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat; 1 if all are alike, or if they follow no rule.

        Engines that do not read the list of kinds take the rule for granted, so it must hold afterwards.
        """
        lists = [v for name, v in self.parsed.to_dict().items() if name not in NUMBERS and self._of_each_layer(name, v)]
        lists += [self.kinds] if self.kinds else []  # a rule such as "every second block is a mixture" is in no list
        kinds = [tuple(map(str, row)) for row in zip(*lists, strict=True)]
        for length in range(1, self.layers // 2 + 1):
            if all(kind == kinds[place % length] for place, kind in enumerate(kinds)):
                return length
        return 1


def counts_predictors(name: str) -> bool:
    """Whether an entry of a config says how many layers predict further tokens.

    >>> [counts_predictors(name) for name in ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_loss_weight")]
    [True, True, False]
    """
    return bool(PREDICTOR.search(name)) and "num" in name


def rounded(width: int, fraction: float, multiple: int, name: str) -> int:
    """Return what a fraction leaves of a width, as the nearest multiple.

    >>> rounded(1536, 0.2, 64, "neurons")
    1216

    Raises:
        OptionError: it leaves nothing, or everything.
    """
    left = round(width * (1 - fraction) / multiple) * multiple
    largest = (width - 1) // multiple * multiple
    if 0 < left < width:
        return left
    if largest <= 0:
        raise OptionError(f"{name}: {width} cannot be cut to a smaller multiple of {multiple}; give a smaller --round")
    nearest = max(largest, 1) if left else multiple
    raise OptionError(
        f"{name}: {fraction:g} of {width} leaves {left} as a multiple of {multiple}; the nearest legal fraction is "
        f"{1 - nearest / width:.4g}, which leaves {nearest}"
    )


def changes(old: Config, new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return what differs: name -> former and new value."""
    found = {name: [old.text.get(name, old.get(name)), value] for name, value in new.items()}
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}

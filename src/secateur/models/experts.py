"""Fused experts: a mixture's matrices lie in 3-D parameters, with no linear layer that could be watched.

transformers calls every such module through one interface, and lets others be registered there. The function
registered here computes what its own do, expert by expert, and shows each matrix's input beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

INTERFACE = "secateur"

See = Callable[[Mapping[str, Tensor]], None]


def expert_keys(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's fused parameters, up and down; empty if it has no experts behind the interface."""
    if not all(hasattr(module, mark) for mark in ("num_experts", "has_gate", "has_bias", "is_transposed")):
        return ()
    keys = (_up(module), "down_proj")
    return keys if all(getattr(module._parameters.get(key), "ndim", 0) == 3 for key in keys) else ()


def _up(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


@dataclass(frozen=True)
class Watch:
    """Who wants to see the inputs of one module's experts.

    Attributes:
        names: parameter -> expert -> the matrix's name.
        see: is shown inputs by name; may add to `everywhere` while it looks.
        everywhere: names of matrices whose expert is also run on all tokens of the layer, for `see` alone.
        hear: is told of each expert's number, its output [T, D], and the weights [T] that its gate gives to it.
    """

    names: Mapping[str, Mapping[int, str]]
    see: See
    everywhere: Collection[str]
    hear: Callable[[int, Tensor, Tensor], None] | None = None

    def show(self, key: str, routed: Callable[[int], Tensor], every: Callable[[int], Tensor]) -> None:
        """Show the inputs of one parameter's matrices: of the tokens routed to them, or of all."""
        names = self.names.get(key, {})
        own = {name: routed(expert) for expert, name in names.items() if name not in self.everywhere}
        if own:
            self.see(own)
        rest = {name: every(expert) for expert, name in names.items() if name in self.everywhere}
        if rest:
            self.see(rest)


@contextmanager
def experts_watched(watches: Mapping[nn.Module, Watch]) -> Iterator[None]:
    """Run these modules by our function for a while."""
    configs: dict[int, Any] = {id(module.config): module.config for module in watches}
    former = {key: config._experts_implementation for key, config in configs.items()}
    for module, watch in watches.items():
        module.__dict__["secateur_watch"] = watch
    for config in configs.values():
        config._experts_implementation = INTERFACE
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = former[key]
        for module in watches:
            del module.__dict__["secateur_watch"]


def _experts(self: Any, hidden_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert on the tokens [T] routed to it: down(act(up(x))), weighted and summed."""
    watch: Watch | None = self.__dict__.get("secateur_watch")
    routed = [torch.where(top_k_index == expert) for expert in range(self.num_experts)]
    if watch:
        watch.show(_up(self), lambda e: hidden_TD[routed[e][0]], lambda e: hidden_TD)
    inner = [_inner(self, expert, hidden_TD[token]) for expert, (token, _) in enumerate(routed)]
    if watch:
        watch.show("down_proj", lambda e: inner[e], lambda e: _inner(self, e, hidden_TD))
    out_TD = torch.zeros_like(hidden_TD, dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
    for expert, (token, slot) in enumerate(routed):
        y_TD = _linear(self, "down_proj", expert, inner[expert])
        if getattr(self, "has_post_expert_norm", False):
            y_TD = self.post_expert_norm(y_TD)
        if watch and watch.hear:
            watch.hear(expert, y_TD, top_k_weights[token, slot])
        out_TD.index_add_(0, token, (y_TD * top_k_weights[token, slot, None]).to(out_TD.dtype))
    return out_TD.to(hidden_TD.dtype)


def _inner(self: Any, expert: int, x_TD: Tensor) -> Tensor:
    up_TF = _linear(self, _up(self), expert, x_TD)
    inner: Tensor = self._apply_gate(up_TF) if self.has_gate else self.act_fn(up_TF)
    return inner


def _linear(self: Any, key: str, expert: int, x_TI: Tensor) -> Tensor:
    W: Tensor = getattr(self, key)[expert]
    bias = getattr(self, f"{key}_bias")[expert] if self.has_bias else None
    return nn.functional.linear(x_TI, W.T if self.is_transposed else W, bias)


ALL_EXPERTS_FUNCTIONS.register(INTERFACE, _experts)

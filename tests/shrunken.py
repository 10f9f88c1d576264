"""Tiny models of many families, cut in every way that their configs can say, and what transformers makes of them.

The whole model with the removed parts silenced is put together here from the two checkpoints alone: which rows and
columns are left is found by comparing tensors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

IDS = torch.arange(3, 51).reshape(2, 24)

# Loads models where importing Secateur is refused, and keeps what they predict.
LOADING = """
import json, sys
import torch
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "secateur":
            raise ImportError("secateur is blocked here")
sys.meta_path.insert(0, Refused())
try:
    import secateur
except ImportError:
    pass
else:
    sys.exit("secateur is not blocked")
from transformers import AutoModelForCausalLM
folders, ids, target = json.loads(sys.stdin.read())
found = {}
for folder in folders:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    with torch.no_grad():
        found[folder] = model.eval()(input_ids=torch.tensor(ids), use_cache=False).logits
torch.save(found, target)
"""


def opened_elsewhere(folders: list[Path], target: Path) -> dict[str, torch.Tensor]:
    """The logits of models, each opened in a process in which Secateur cannot be imported."""
    asked = json.dumps([list(map(str, folders)), IDS.tolist(), str(target)])
    done = subprocess.run([sys.executable, "-c", LOADING], input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, torch.Tensor] = torch.load(target)
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def left_columns(whole: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """Which columns of a matrix [out, in] are those of another, in order."""
    found, place = torch.zeros(whole.shape[1], dtype=torch.bool), 0
    for column in range(whole.shape[1]):
        if place < cut.shape[1] and torch.equal(whole[:, column], cut[:, place]):
            found[column], place = True, place + 1
    assert place == cut.shape[1], "the cut matrix is no part of the whole one"
    return found


READERS = ("down_proj", "fc2", "dense_4h_to_h", "o_proj", "mlp.c_proj", "out_proj", "fc_out")


def silence_columns(model: Any, cut: Any) -> int:
    """Zero, in a whole model, the columns that a cut one no longer has; return how many they were."""
    theirs, gone = dict(cut.named_parameters()), 0
    for name, parameter in model.named_parameters():
        if parameter.shape == theirs[name].shape or not any(leaf in name for leaf in READERS):
            continue
        turned = "c_proj" in name or (parameter.ndim == 3 and parameter.shape[1] != theirs[name].shape[1])
        pairs = zip(parameter, theirs[name], strict=True) if parameter.ndim == 3 else [(parameter, theirs[name])]
        for one, other in pairs:
            W, V = (t.data.T if turned else t.data for t in (one, other))
            left = left_columns(W, V)
            W[:, ~left] = 0
            gone += int((~left).sum())
    return gone


@contextmanager
def without_experts(model: Any, cut: Any) -> Iterator[int]:
    """Have a whole model's routers answer minus infinity for the experts that a cut one no longer has."""
    theirs, linear, gone = dict(cut.named_parameters()), torch.nn.functional.linear, {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("router" in name or ".gate." in name) and theirs[name].shape != parameter.shape:
            gone[id(parameter)] = ~left_columns(parameter.data.T, theirs[name].data.T)

    def silenced(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = linear(x, weight, bias)
        return out.masked_fill(gone[id(weight)], -torch.inf) if id(weight) in gone else out

    with patch("torch.nn.functional.linear", silenced):
        yield sum(int(mark.sum()) for mark in gone.values())


@contextmanager
def without_blocks(blocks: Any, removed: list[int]) -> Iterator[None]:
    """Have blocks of a whole model hand on what they are given."""
    with ExitStack() as stack:
        for index in removed:
            block = blocks[index]
            real, returns = block.forward, {}

            def through(*args: Any, real: Any = real, returns: Any = returns, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                out = real(*args, **kwargs)
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

            stack.enter_context(patch.object(block, "forward", through))
        yield

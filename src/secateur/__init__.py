"""Secateur prunes large language models after training, and hands back models that are smaller and faster.

>>> import secateur
>>> secateur.parse_pattern("2:4").fixed_sparsity
0.5
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    DataError,
    ModelError,
    NumericsError,
    OptionError,
    OutputError,
    ResumeError,
    SecateurError,
)
from .runtime.register import register

if TYPE_CHECKING:
    from . import pruning
    from .api import (
        PruneResult,
        bench,
        compare,
        evaluate,
        finetune,
        generate,
        inspect,
        pack,
        prune,
        report,
        sensitivity,
        shrink,
        unpack,
    )
    from .pipeline.reconstruct import Reconstruction
    from .pruning import METHODS, Method, parse_method, parse_pattern
    from .runtime.arrangement import optimize
    from .training.callbacks import GradualPruning, KeepSparsity
    from .training.gradual import gradual
    from .training.lora import masked_lora, merge_lora
    from .training.masks import Masks

# Names that need torch are found when they are asked for, so that `import secateur` and `--help` stay quick.
_LAZY = {
    "PruneResult": "api",
    "Reconstruction": "pipeline.reconstruct",
    "bench": "api",
    "compare": "api",
    "evaluate": "api",
    "finetune": "api",
    "generate": "api",
    "inspect": "api",
    "optimize": "runtime.arrangement",
    "pack": "api",
    "prune": "api",
    "report": "api",
    "sensitivity": "api",
    "shrink": "api",
    "unpack": "api",
    "GradualPruning": "training.callbacks",
    "KeepSparsity": "training.callbacks",
    "Masks": "training.masks",
    "gradual": "training.gradual",
    "masked_lora": "training.lora",
    "merge_lora": "training.lora",
    "METHODS": "pruning",
    "Method": "pruning",
    "parse_method": "pruning",
    "parse_pattern": "pruning",
}

__all__ = [
    "METHODS",
    "DataError",
    "GradualPruning",
    "KeepSparsity",
    "Masks",
    "Method",
    "ModelError",
    "NumericsError",
    "OptionError",
    "OutputError",
    "PruneResult",
    "Reconstruction",
    "ResumeError",
    "SecateurError",
    "__version__",
    "bench",
    "compare",
    "evaluate",
    "finetune",
    "generate",
    "gradual",
    "inspect",
    "masked_lora",
    "merge_lora",
    "optimize",
    "pack",
    "parse_method",
    "parse_pattern",
    "prune",
    "pruning",
    "report",
    "sensitivity",
    "shrink",
    "unpack",
]


register()  # from_pretrained opens packed checkpoints from here on


def __getattr__(name: str) -> Any:
    if name == "pruning":
        return import_module(".pruning", __name__)
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

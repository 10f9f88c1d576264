"""The Python interface: what the command line does, with the same names."""

from .allocating import sensitivity
from .comparing import compare, report
from .making import PruneResult, pack, prune, unpack
from .measuring import bench, evaluate, generate, inspect
from .shrinking import shrink
from .training import finetune

__all__ = [
    "PruneResult",
    "bench",
    "compare",
    "evaluate",
    "finetune",
    "generate",
    "inspect",
    "pack",
    "prune",
    "report",
    "sensitivity",
    "shrink",
    "unpack",
]

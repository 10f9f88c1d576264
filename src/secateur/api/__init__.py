"""The Python interface: what the command line does, with the same names."""

from .allocating import sensitivity
from .making import PruneResult, pack, prune, unpack
from .measuring import bench, compare, evaluate, generate, inspect, report

__all__ = [
    "PruneResult",
    "bench",
    "compare",
    "evaluate",
    "generate",
    "inspect",
    "pack",
    "prune",
    "report",
    "sensitivity",
    "unpack",
]

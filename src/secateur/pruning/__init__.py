"""The mathematics of pruning: pure functions of one matrix. Imports torch only."""

from .allocation import MatrixInfo, Target, allocate, mean_sparsity
from .alps import alps
from .methods import METHODS, Method, method_options, one_shot, parse_method, updated
from .patterns import NM, Block, Matrix, Pattern, Row, detect_pattern, parse_pattern
from .scores import magnitude, ria, wanda
from .sparsegpt import sparsegpt
from .statistics import GRAM, SUM, SUMSQ, Accumulator, Statistics
from .swaps import swaps
from .updates import STAGES, obs, pcg

__all__ = [
    "GRAM",
    "METHODS",
    "NM",
    "STAGES",
    "SUM",
    "SUMSQ",
    "Accumulator",
    "Block",
    "Matrix",
    "MatrixInfo",
    "Method",
    "Pattern",
    "Row",
    "Statistics",
    "Target",
    "allocate",
    "alps",
    "detect_pattern",
    "magnitude",
    "mean_sparsity",
    "method_options",
    "obs",
    "one_shot",
    "parse_method",
    "parse_pattern",
    "pcg",
    "ria",
    "sparsegpt",
    "swaps",
    "updated",
    "wanda",
]

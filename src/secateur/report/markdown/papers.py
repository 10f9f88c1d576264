"""Where each method is published."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """Where a method is published."""

    name: str
    authors: str
    title: str
    where: str
    link: str


PAPERS = {
    "magnitude": Paper(
        "magnitude pruning", "Song Han, Jeff Pool, John Tran, William J. Dally",
        "Learning both Weights and Connections for Efficient Neural Networks",
        "NIPS 2015; here without its retraining", "https://arxiv.org/abs/1506.02626",
    ),
    "wanda": Paper(
        "Wanda", "Mingjie Sun, Zhuang Liu, Anna Bair, J. Zico Kolter",
        "A Simple and Effective Pruning Approach for Large Language Models",
        "ICLR 2024", "https://arxiv.org/abs/2306.11695",
    ),
    "sparsegpt": Paper(
        "SparseGPT", "Elias Frantar, Dan Alistarh",
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "ICML 2023", "https://arxiv.org/abs/2301.00774",
    ),
    "ria": Paper(
        "RIA", "Yingtao Zhang, Haoli Bai, Haokun Lin, Jialin Zhao, Lu Hou, Carlo Vittorio Cannistraci",
        "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        "ICLR 2024; here without its channel permutation", "https://openreview.net/forum?id=Tr0lPx9woF",
    ),
}  # fmt: skip

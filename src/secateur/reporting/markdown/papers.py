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
    "alps": Paper(
        "ALPS", "Xiang Meng, Kayhan Behdin, Haoyue Wang, Rahul Mazumder",
        "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        "NeurIPS 2024", "https://arxiv.org/abs/2406.07831",
    ),
}  # fmt: skip

# What follows a method.
STAGE_PAPERS = {
    "pcg": PAPERS["alps"]._replace(name="PCG (ALPS)"),
    "obs": PAPERS["sparsegpt"]._replace(name="update (SparseGPT)"),
    "swaps": Paper(
        "SparseSwaps", "Max Zimmer, Christophe Roux, Moritz Wagner, Deborah Hendrych, Sebastian Pokutta",
        "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
        "2025", "https://arxiv.org/abs/2512.10922",
    ),
}  # fmt: skip

# What shares sparsity out, and what fits blocks after their pruning.
ALLOCATION_PAPERS = {
    "linear": Paper(
        "ATP", "Weizhong Huang, Yuxin Zhang, Xiawu Zheng, Fei Chao, Rongrong Ji",
        "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
        "ICML 2025; here with a slope that is sought by KL divergence", "https://arxiv.org/abs/2502.14770",
    ),
    "owl": Paper(
        "OWL",
        "Lu Yin, You Wu, Zhenyu Zhang, Cheng-Yu Hsieh, Yaqing Wang, Yiling Jia, Gen Li, Ajay Jaiswal, "
        "Mykola Pechenizkiy, Yi Liang, Michael Bendersky, Zhangyang Wang, Shiwei Liu",
        "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        "ICML 2024", "https://arxiv.org/abs/2310.05175",
    ),
    "alpha": Paper(
        "AlphaPruning", "Haiquan Lu, Yefan Zhou, Shiwei Liu, Zhangyang Wang, Michael W. Mahoney, Yaoqing Yang",
        "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large "
        "Language Models",
        "NeurIPS 2024", "https://arxiv.org/abs/2410.10912",
    ),
}  # fmt: skip
EBFT = Paper(
    "EBFT", "Song Guo, Fan Wu, Lei Zhang, Xiawu Zheng, Shengchuan Zhang, Fei Chao, Yiyu Shi, Rongrong Ji",
    "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs",
    "2024; here towards the dense model's own hidden states", "https://arxiv.org/abs/2402.12419",
)  # fmt: skip

ZIPLM = Paper(
    "ZipLM", "Eldar Kurtic, Elias Frantar, Dan Alistarh",
    "ZipLM: Inference-Aware Structured Pruning of Language Models",
    "NeurIPS 2023; here a few at a time and without its measured runtimes", "https://arxiv.org/abs/2302.04089",
)  # fmt: skip
FLAP = Paper(
    "FLAP", "Yongqi An, Xu Zhao, Tao Yu, Ming Tang, Jinqiao Wang",
    "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    "AAAI 2024; here every block keeps the same width", "https://arxiv.org/abs/2312.11983",
)  # fmt: skip

# What chooses neurons and heads, what chooses blocks, and what chooses experts.
CRITERIA_PAPERS = {
    "obs": ZIPLM,
    "flap": FLAP,
    "wanda-sp": FLAP._replace(name="Wanda-sp, a baseline of FLAP"),
    "magnitude": Paper(
        "magnitude pruning of whole columns", "Hao Li, Asim Kadav, Igor Durdanovic, Hanan Samet, Hans Peter Graf",
        "Pruning Filters for Efficient ConvNets", "ICLR 2017", "https://arxiv.org/abs/1608.08710",
    ),
}  # fmt: skip
DEPTH_PAPERS = {
    "kl": Paper(
        "SLEB", "Jiwon Song, Kyungseok Oh, Taesu Kim, Hyungjun Kim, Yulhwa Kim, Jae-Joon Kim",
        "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
        "ICML 2024; here with KL divergence for its perplexity", "https://arxiv.org/abs/2402.09025",
    ),
    "influence": Paper(
        "ShortGPT",
        "Xin Men, Mingyu Xu, Qingyu Zhang, Bingning Wang, Hongyu Lin, Yaojie Lu, Xianpei Han, Weipeng Chen",
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        "2024", "https://arxiv.org/abs/2403.03853",
    ),
}  # fmt: skip
REAP = Paper(
    "REAP", "Mike Lasby, Ivan Lazarevich, Nish Sinnadurai, Sean Lie, Yani Ioannou, Vithursan Thangarasa",
    "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression",
    "2025", "https://arxiv.org/abs/2510.13999",
)  # fmt: skip

PERP = Paper(
    "PERP", "Max Zimmer, Megi Andoni, Christoph Spiegel, Sebastian Pokutta",
    "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
    "2023", "https://arxiv.org/abs/2312.15230",
)  # fmt: skip

# How sparsity rises while a model is trained: by the name of the schedule, or in rounds.
SCHEDULE_PAPERS = {
    "cubic": Paper(
        "Gradual pruning", "Michael Zhu, Suyog Gupta",
        "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        "2017", "https://arxiv.org/abs/1710.01878",
    ),
    "one-cycle": Paper(
        "One-cycle pruning", "Nathan Hubens, Matei Mancas, Bernard Gosselin, Marius Preda, Titus Zaharia",
        "One-Cycle Pruning: Pruning ConvNets Under a Tight Training Budget",
        "2021", "https://arxiv.org/abs/2107.02086",
    ),
    "rounds": Paper(
        "Iterative pruning", "Song Han, Jeff Pool, John Tran, William J. Dally",
        "Learning both Weights and Connections for Efficient Neural Networks",
        "NIPS 2015", "https://arxiv.org/abs/1506.02626",
    ),
}  # fmt: skip


def cited(paper: Paper) -> str:
    """Return a paper as a table's cell shows it."""
    return f"{paper.name}: {paper.authors}, *[{paper.title}]({paper.link})*, {paper.where}"

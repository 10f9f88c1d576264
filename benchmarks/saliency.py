"""Which formula tells what a weight is worth: the error that is left when it goes and the others make up for it.

    python benchmarks/saliency.py > benchmarks/results/saliency.json

Inputs of one matrix of SmolLM2 (block 10, q_proj) on 4,096 tokens of the State of the Union; H is their Gram matrix
with 1 % damping, in float64. For 300 random weights the true rise of the squared output error is solved by least
squares, and compared with w² / [H⁻¹]_qq (optimal brain surgeon, SparseGPT), with w² / H_qq, which popular summaries
print, and with w² H_qq (Wanda squared: nothing makes up for the weight).
"""

import json
import tempfile
from pathlib import Path

import torch

from secateur.models.gguf import as_checkpoint
from secateur.models.source import load_model, load_tokenizer, locate
from secateur.pipeline.sources import read_source


def main():
    with tempfile.TemporaryDirectory() as scratch:
        directory = as_checkpoint(locate("smollm2"), Path(scratch))
        model, tokenizer = load_model(directory, torch.float32), load_tokenizer(directory)
    ids = torch.tensor(tokenizer("\n\n".join(read_source("sotu:train", "train").texts))["input_ids"][:4096]).view(
        8, 512
    )
    linear, inputs = model.model.layers[10].self_attn.q_proj, []
    linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(ids)
    x_TI, W_OI = torch.cat(inputs).double(), linear.weight.detach().double()
    H_II = x_TI.T @ x_TI
    H_II += 0.01 * H_II.diagonal().mean() * torch.eye(len(H_II), dtype=torch.float64)
    inverse_II = torch.linalg.inv(H_II)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(W_OI), (300,), generator=generator)
    columns = torch.randint(len(H_II), (300,), generator=generator)
    w_N = W_OI[rows, columns]
    true_N = torch.stack([rise(H_II, int(column)) for column in columns]) * w_N**2
    formulas = {
        "w² / [H⁻¹]_qq": w_N**2 / inverse_II.diagonal()[columns],
        "w² / H_qq": w_N**2 / H_II.diagonal()[columns],
        "w² H_qq": w_N**2 * H_II.diagonal()[columns],
    }
    found = {
        name: {
            "median_ratio_to_true": float((value_N / true_N).median()),
            "largest_relative_error": float((value_N / true_N - 1).abs().max()),
            "rank_correlation": rank_correlation(value_N, true_N),
        }
        for name, value_N in formulas.items()
    }
    print(json.dumps(found, indent=1, ensure_ascii=False))


def rise(H_II, column):
    """The least squared error for removing a weight of 1: min over d with d_column = 1 of dᵀ H d, solved as such."""
    others = [index for index in range(len(H_II)) if index != column]
    d = -torch.linalg.solve(H_II[others][:, others], H_II[others, column])
    whole = torch.ones(len(H_II), dtype=torch.float64)
    whole[others] = d
    return whole @ H_II @ whole


def rank_correlation(a_N, b_N):
    ranks = torch.stack([a_N.argsort().argsort(), b_N.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


if __name__ == "__main__":
    main()

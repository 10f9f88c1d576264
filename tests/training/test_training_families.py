"""What holds for a llama holds for decoders of other shapes: fused matrices, Conv1D, experts, states."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import secateur
from secateur.progress import Silent
from test_families import family_model

KINDS = (
    "gpt2", "bloom", "falcon", "phi3", "gemma2", "mamba", "qwen3_next", "mixtral", "qwen3_moe",
    "deepseek_v3", "deepseek_v4", "gpt_oss",
)  # fmt: skip
WAYS = {
    "full": ("pruned", {"train": "full"}),
    "lora": ("pruned", {"train": "lora"}),
    "gradual": ("dense", {"pattern": "2:4", "method": "wanda", "every": 1}),
}
ROWS = torch.arange(3, 3 + 12 * 8).reshape(12, 8)


@pytest.fixture(scope="module", params=KINDS)
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    family_model(request.param).save_pretrained(folder / "dense")
    secateur.prune(folder / "dense", folder / "pruned", method="magnitude", progress=Silent())
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_family_is_trained_with_its_zeros(way, models, tmp_path):
    name, options = WAYS[way]
    report = secateur.finetune(
        models / name, tmp_path / "out", ROWS, steps=3, seqlen=8, learning_rate=0.01, progress=Silent(), **options
    )
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (models / name, tmp_path / "out"))
    changed = 0
    for parameter, (trained, now) in zip(before.parameters(), after.named_parameters(), strict=True):
        if way != "gradual" and report["plan"]["train"] != "full":
            assert ((parameter == 0) == (now == 0)).all(), trained
        changed += not torch.equal(parameter, now)
    assert changed
    for matrix in report["matrices"]:
        assert matrix["zeros"] == matrix["zeros_before"] if way != "gradual" else matrix["sparsity"] == 0.5, matrix

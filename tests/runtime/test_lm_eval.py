"""lm-eval opens packed checkpoints by itself, once secateur is imported."""

import json

import pytest
import yaml

import secateur
from secateur.runtime.linear import PackedLinear
from tiny import rows, save_tiny

TASK = {
    "task": "garden",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "label",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_a_packed_model_is_evaluated(tmp_path, tokenizer):
    import lm_eval
    from lm_eval.tasks import TaskManager

    width = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
    save_tiny(tmp_path / "model", "llama", tokenizer=tokenizer, **width)
    secateur.prune(tmp_path / "model", tmp_path / "dense", calibration=rows())
    secateur.pack(tmp_path / "dense", tmp_path / "packed")

    documents = [
        {"question": f"The tree {n}", "choices": ["grows", "sleeps", "cuts"], "label": n % 3} for n in range(6)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}}}
    (tmp_path / "garden.yaml").write_text(yaml.safe_dump(task))

    def choices(name):
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=f"pretrained={tmp_path / name},dtype=float32",
            tasks=["garden"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            device="cpu",
            batch_size=2,
            log_samples=True,
        )
        return [[float(choice[0]) for choice, *_ in sample["resps"]] for sample in found["samples"]["garden"]]

    for packed, dense in zip(choices("packed"), choices("dense"), strict=True):
        assert packed == pytest.approx(dense, rel=1e-4)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert any(isinstance(module, PackedLinear) for module in model.modules())

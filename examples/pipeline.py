"""Load, prune, recover, save, reload without Secateur: `python pipeline.py MODEL TRAIN.txt TEST.txt OUTPUT`."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import secateur

ELSEWHERE = """import sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
weights = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
print("zeros    ", zeros, "secateur" in sys.modules)"""


def main(name, train, test, output, seqlen=128, steps=100):
    def perplexity(model):
        return secateur.evaluate(model, text=test, seqlen=seqlen, windows=8)["perplexity"]

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    ids = tokenizer(Path(train).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    print("dense    ", perplexity(model))
    secateur.prune(model, method="wanda", pattern="2:4", calibration=rows[:64])
    print("pruned   ", perplexity(model))
    settings = TrainingArguments(output, max_steps=steps, learning_rate=1e-4, save_strategy="no", report_to="none")
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, settings, train_dataset=data, callbacks=[secateur.KeepSparsity()]).train()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    subprocess.run([sys.executable, "-c", ELSEWHERE, output], check=True)
    print("recovered", perplexity(output))


if __name__ == "__main__":
    main(*sys.argv[1:])

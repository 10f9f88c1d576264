"""Kill pruning runs at every point where they touch the disk, go on with each, and print what went wrong as JSON.

``python dying_runs.py MODEL FOLDER SCENARIO...``: torch is imported once and each run is a fork, killed by SIGKILL
before its n-th change to the disk (or in the middle of it, where a change is not atomic), for n = 1, 2, ... until
a run lives.
"""

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

import secateur
from secateur.pipeline import estimate, run_directory, stream
from secateur.pipeline.reconstruct import Reconstruction
from tiny import files_below

ROWS = [torch.arange(3, 3 + n) for n in (24, 24, 17, 17, 17)]  # two micro-batches
WANDA = {"calibration": ROWS, "method": "wanda"}
MAGNITUDE = {"method": "magnitude", "sparsity": 0.25}
ANYTHING = ("replace", "rename", "unlink", "rmdir", "put", "note")


class Fuse:
    """Kills the process when it is touched for the n-th time."""

    def __init__(self, n, log):
        self.left, self.log = n, log

    def touch(self, what):
        with self.log.open("a") as file:
            file.write(what + "\n")
        self.left -= 1
        return self.left == 0

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, kinds):
        for name in {"replace", "rename", "unlink", "rmdir"}.intersection(kinds):
            setattr(os, name, self._before(name, getattr(os, name)))
        os.fsync = lambda descriptor: None  # a killed process loses nothing of what it has written
        put, note = stream.Stream.put, run_directory.RunDirectory.note

        def torn_put(self_, index, number, hidden):
            if "put" in kinds and self.touch("put"):
                torn = hidden.detach().clone()
                torn[:, torn.shape[1] // 2 :] = 1e9
                put(self_, index, number, torn)
                self.die()
            put(self_, index, number, hidden)

        def torn_note(self_, event):
            if "note" in kinds and self.touch("note"):
                with (self_.path / "journal.jsonl").open("ab") as file:
                    file.write(json.dumps(event).encode()[:-7])
                self.die()
            note(self_, event)

        stream.Stream.put, run_directory.RunDirectory.note = torn_put, torn_note

    def _before(self, name, function):
        def wrapped(*args, **kwargs):
            if self.touch(name):
                self.die()
            return function(*args, **kwargs)

        return wrapped


def attempt(log, model, output, options, *, die_at=0, kinds=(), prepare=lambda: None):
    """Prune in a fork; return ``"killed"``, ``"done"``, or the error's text."""
    said = log.with_suffix(".said")
    if not (child := os.fork()):
        try:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            prepare()
            Fuse(die_at, log).watch(kinds)
            secateur.prune(model, output, **options)
        except secateur.SecateurError as error:
            said.write_text(f"{type(error).__name__}: {error}")
            os._exit(3)
        except BaseException:
            said.write_text(traceback.format_exc())
            os._exit(4)
        os._exit(0)
    return outcome(child, said)


def outcome(child, said):
    """How a fork ended: ``"killed"``, ``"done"``, or what it said."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed"
    return "done" if os.WEXITSTATUS(status) == 0 else said.read_text()


def result(directory):
    """Everything in an output but its times and memory; None if it is not there."""
    if not directory.exists():
        return None
    files = files_below(directory)
    if "README.md" in files:  # a card, which tells the time that pruning took
        files["README.md"] = re.sub(rb"\| (Time to prune|Peak memory) \|.*", b"", files["README.md"])
    if "secateur.json" in files:
        report = json.loads(files.pop("secateur.json"))
        for key in ("seconds", "peak_memory_bytes"):
            report.pop(key)
        for block in report["blocks"]:
            block.pop("seconds")
        files["report"] = report
    return files


def rebooted():
    """Another boot, after which what was not flushed is lost: hidden states."""
    run_directory.boot_id = lambda: "another"
    for path in Path().glob("out.secateur/hidden/**/*.bin"):
        path.write_bytes(b"")


def scenario(model, folder, options, *, former=None, then=None, kinds=ANYTHING, reboot=False):
    """Kill at every point; return the number of kinds of points, and what was wrong after each."""
    then = options if then is None else then
    references = []
    for number, wanted in enumerate((former, options, then)):
        attempt(folder / "log", model, folder / f"reference{number}", wanted or MAGNITUDE)
        references.append(result(folder / f"reference{number}"))
    allowed = (references[0] if former else None, references[1])
    problems, seen = [], Counter()
    for die_at in range(1, 1000):
        place = folder / f"run{die_at}"
        place.mkdir()
        os.chdir(place)
        log, output = place / "log", Path("out")
        if former:
            shutil.copytree(folder / "reference0", output)
        end = attempt(log, model, output, options, die_at=die_at, kinds=kinds)
        point = f"{die_at} ({(log.read_text().splitlines() or ['?'])[-1]})"
        found = result(output)
        if end == "done":
            seen = Counter(log.read_text().split())
        elif end != "killed":
            problems.append(f"{point}: {end}")
        if found not in allowed and not (former and found is None):
            problems.append(f"{point}: OUTPUT is half-written: {sorted(found)}")
        again = attempt(log, model, output, then, prepare=rebooted if reboot else lambda: None)
        refused = then is not options and again.startswith("ResumeError")
        if again != "done" and not refused:
            problems.append(f"{point}, then: {again.strip().splitlines()[-1]}")
        elif not refused and result(output) != references[2]:
            problems.append(f"{point}, then: another result")
        elif not refused and Path("out.secateur").exists():
            problems.append(f"{point}, then: the run directory is left: {sorted(files_below(Path('out.secateur')))}")
        if end == "done":
            break
        shutil.rmtree(place)
    return {"points": seen, "problems": problems}


DENSE = {**WANDA, "propagate": "dense"}
RECONSTRUCT = {
    "method": "magnitude", "calibration": [torch.arange(n, n + 16) for n in range(3, 11)],
    "reconstruct": Reconstruction(epochs=2, batch_tokens=16),
}  # fmt: skip
INSTEAD = {**MAGNITUDE, "overwrite": True}
SCENARIOS = {
    "plain": {"options": WANDA},
    "nothing needed": {"options": MAGNITUDE, "kinds": ("replace", "note")},
    "dense": {"options": DENSE, "kinds": ("put", "note")},
    "machine restarted": {"options": WANDA, "kinds": ("put", "note"), "reboot": True},
    "machine restarted, dense": {"options": DENSE, "kinds": ("put", "note"), "reboot": True},
    "machine restarted, reconstruct": {"options": RECONSTRUCT, "kinds": ("replace", "note"), "reboot": True},
    "overwrite": {"options": {**WANDA, "overwrite": True}, "former": MAGNITUDE, "kinds": ("replace", "unlink")},
    "another plan afterwards": {"options": WANDA, "then": INSTEAD, "kinds": ("note", "unlink", "rmdir")},
    "anew afterwards": {"options": WANDA, "then": {**INSTEAD, "resume": False}, "kinds": ("note", "unlink")},
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    estimate._operations_per_second = lambda: 1e9  # only a guess of seconds comes of it
    model, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    secateur.prune(model, folder / "warm", **WANDA)  # so that forks find everything imported
    found = {}
    for name in sys.argv[3:] or SCENARIOS:
        (folder / name).mkdir(parents=True)
        found[name] = scenario(model, folder / name, **SCENARIOS[name])
    print(json.dumps(found))

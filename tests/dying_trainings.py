"""Train, kill at a given point, go on, and print how each process ended, as JSON.

``python dying_trainings.py MODELS FOLDER COURSES KILL...``: torch is imported once, and each training is a fork.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import secateur
from secateur.pipeline.run_directory import RunDirectory
from secateur.progress import Silent
from secateur.training import trainer

torch.set_num_threads(1)  # what forks must not have used others


def arm(kill):
    """Kill this process after the n-th checkpoint ("after n"), within it, or when all is "written"."""
    saves = 0
    on_save, save, write = trainer.Reporter.on_save, trainer.SparseTrainer.save_model, RunDirectory.write_block

    def die_if(now):
        if now == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(self, *args, **kwargs):
        nonlocal saves
        on_save(self, *args, **kwargs)
        saves += 1
        die_if(f"after {saves}")

    def saved(self, *args, **kwargs):
        save(self, *args, **kwargs)
        die_if(f"within {saves + 1}")

    def written(self, *args):
        write(self, *args)
        die_if("written")

    trainer.Reporter.on_save, trainer.SparseTrainer.save_model, RunDirectory.write_block = noted, saved, written


def trained(models, name, output, options, kill=None):
    """Train in a fork; how it ended."""
    pid = os.fork()
    if not pid:
        try:
            arm(kill)
            settings = {"steps": 10, "seqlen": 16, "eval_steps": 3, "progress": Silent(), **options}
            secateur.finetune(models / name, output, models / "text.txt", **settings)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(models, folder, courses, kills):
    ended = {}
    for course, (name, options) in courses.items():
        assert trained(models, name, folder / course, options) == 0
        for kill in kills:
            output = folder / f"{course}, {kill}"
            run = folder / f"{course}, {kill}.secateur"
            first = trained(models, name, output, options, kill)
            there = {"output": output.exists(), "checkpoints": any((run / "trainer").glob("checkpoint-*"))}
            second = trained(models, name, output, options)
            ended[output.name] = {"first": first, **there, "second": second, "left": run.exists()}
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:])

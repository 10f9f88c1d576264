"""Share products among threads, in ways that break thread pools: ``python threaded_products.py POOL SCENARIO...``.

POOL is ``borrowed``, for OpenMP's threads where torch has them, or ``own``. Prints ``ok``.
"""

import faulthandler
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

from packings import FORMATS, large, normal
from secateur.runtime import kernels
from secateur.runtime.kernels import KernelMatrix

SECONDS = 60  # until what hangs is killed


class Problem:
    """A matrix of more than 4 MiB, so that four threads share it, inputs, and what comes of them on one thread."""

    def __init__(self, format):
        self.matrix = KernelMatrix(*large(format, "float32"))
        self.x = normal(2, self.matrix.columns)
        torch.set_num_threads(1)
        self.y, self.y0 = self.matrix.linear(self.x), self.matrix.linear(self.x[0])

    def right(self):
        return torch.equal(self.matrix.linear(self.x), self.y) and torch.equal(self.matrix.linear(self.x[0]), self.y0)


def problems():
    return [Problem(format) for format in FORMATS]


def many_callers():
    """Several Python threads compute different matrices at once."""
    mine = problems()
    torch.set_num_threads(4)
    with ThreadPoolExecutor(6) as callers:
        found = [callers.submit(mine[number % 3].right) for number in range(60)]
        assert all(future.result(SECONDS) for future in found)


def changing_numbers():
    """The number of threads changes between products, to more than there are processors and than the pool has."""
    mine = problems()
    for number in [1, 2, 4, 1, 3, 2, (os.cpu_count() or 1) + 3, 1, 100, 2]:
        torch.set_num_threads(number)
        assert all(problem.right() for problem in mine), number


def child(work):
    """Run in a forked child; whether it ended well."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(pid, 0)[1] == 0


def on_threads(work):
    """Whether the work is right, and was shared by threads of this process, so far as can be seen."""
    tasks = Path("/proc/self/task")
    return work() and (not tasks.exists() or len(list(tasks.iterdir())) > 1)


def forks():
    """A child computes the same as its parent, after the parent used threads; so do a grandchild, and the parent."""
    mine = problems()
    torch.set_num_threads(4)

    def all_right():
        return all(problem.right() for problem in mine)

    assert child(lambda: on_threads(all_right))  # before any product on threads
    for _ in range(3):
        assert all_right()
        assert child(lambda: on_threads(all_right))
        assert child(lambda: all_right() and child(lambda: on_threads(all_right)) and all_right())


def forks_amid_a_product():
    """The parent is forked while another of its threads is computing."""
    mine = problems()
    torch.set_num_threads(4)
    done, wrong = threading.Event(), []

    def keep_computing():
        while not done.is_set():
            wrong.extend(problem for problem in mine[:2] if not problem.right())

    other = threading.Thread(target=keep_computing)
    other.start()
    good = [child(lambda: on_threads(mine[2].right)) and mine[2].right() for _ in range(20)]
    done.set()
    other.join(SECONDS)
    assert all(good) and not wrong


def exit_at_once():
    """The interpreter ends while threads are awake."""
    problem = Problem("bitmask")
    torch.set_num_threads(4)
    assert problem.right()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    if sys.argv[1] == "own":
        kernels.library().secateur_borrow_threads(None)
    for scenario in sys.argv[2:]:
        globals()[scenario]()
    print("ok", flush=True)

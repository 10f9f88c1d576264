"""Facts about the machine and its software that evidence records."""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from ..errors import OptionError


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, mapped pages included; None where the system does not tell."""
    try:  # Linux's getrusage counts what the process was before exec, that is its parent; this does not
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` count from now on, where the system allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def free_memory_bytes(device: torch.device) -> int:
    """Memory of a device that could be taken now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, unused
        return torch.cuda.mem_get_info(device)[0] + cached
    free: int = psutil.virtual_memory().available
    return free


def boot_id() -> str | None:
    """What names this boot of the machine: after another, unflushed files cannot be trusted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def software() -> dict[str, Any]:
    """Versions of what computes, and the kind of machine."""
    import transformers

    from .._version import __version__

    return {
        "secateur": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def choose_device(device: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise OptionError(f"device {device!r}: not on this machine; use auto or cpu") from None
    return chosen


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute with `count` threads for a while; None leaves it alone."""
    if count is None:
        yield
        return
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


_one_thread = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """Let one of our threads at a time use what is global: random numbers, warnings, settings of libraries.

    Whoever changes them gives back what was there; two threads at once would give back each other's.
    """
    with _one_thread:
        yield

"""The run directory ``OUTPUT.secateur/``: everything that a run needs to go on after it was killed.

    plan.json        what the run does, frozen
    journal.jsonl    one line for every finished block, and for evaluations
    blocks/          the new tensors of each finished block
    cut/             the tensors of blocks with fewer neurons, heads or experts
    trainer/         checkpoints of training
    hidden/          hidden states on their way
    allocating/      the same, while an allocation is found
    source-*/        a GGUF model, dequantised
    output/          the checkpoint while it is being written
    former/          a result that --overwrite replaces, until its successor is in place
    lock             held while a process works here; dies with it

Every file but the journal and the hidden states is written beside its place and renamed into it. A block is
finished when the journal says so, which is after its output lies in `hidden/`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import OutputError, ResumeError, unwritable
from ..models.formats import Packing
from ..models.shards import Info, read_header, tensor_entry, with_packed, write_safetensors
from .files import Journal, into_place, write_text
from .machine import boot_id

log = logging.getLogger("secateur")

REPORT = "secateur.json"

OURS = re.compile(
    r"lock|(plan\.json|journal\.jsonl)(\.part)?|blocks|cut|trainer|hidden|allocating|output|former|source-.*"
)

# Entries of the plan that do not change the result.
COMMENTS = frozenset({"preset", "evaluate", "search", "software"})


class RunDirectory:
    """Owns the run directory of one output, and its lock."""

    def __init__(self, output: Path, resume: bool = True) -> None:
        """Open or create the run directory of `output`.

        Args:
            output: the directory that the run is to make.
            resume: go on with what an earlier run left; otherwise begin anew.

        Raises:
            OutputError: another process works on this output, or the directory cannot be made.
        """
        self.output, self.path = output, run_path(output)
        try:
            if self.path.is_dir() and any(not OURS.fullmatch(child.name) for child in self.path.iterdir()):
                raise OutputError(
                    f"{self.path}: holds files that are not Secateur's; move them or choose another OUTPUT"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / "lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise OutputError(
                f"{output}: another process is working on it; wait for it or choose another OUTPUT"
            ) from None
        except OSError as error:
            with suppress(OSError):
                self.path.rmdir()  # if it is empty
            raise OutputError(f"{self.path}: {unwritable(error)}") from None
        try:
            self._take_over(resume)
        except OSError as error:
            self.release()
            raise OutputError(f"{error.filename or self.path}: {unwritable(error)}") from error
        except OutputError:
            self.release()
            raise

    def _take_over(self, resume: bool) -> None:
        """Put in order what an earlier process left."""
        output = self.output
        if (self.path / "former").exists() and not output.exists():  # killed between the two renames of install
            os.replace(self.path / "former", output)
        elif output.exists():  # killed after the second one
            shutil.rmtree(self.path / "former", ignore_errors=True)
        if not resume or not (self.path / "plan.json").exists():  # killed while it was being removed
            self._empty(keep="source-*")
        try:
            self._journal = Journal(self.path / "journal.jsonl")
        except OutputError as error:
            raise ResumeError(f"{error}; --no-resume begins anew") from None

    def _empty(self, keep: str = "") -> None:
        for child in self.path.iterdir():
            if keep and child.match(keep):
                continue
            if child.is_dir():
                shutil.rmtree(child)
            elif child.name != "lock":
                child.unlink()

    def note(self, event: dict[str, Any]) -> None:
        """Append a line to the journal, and see it on the disk."""
        self._journal.note({**event, "boot": boot_id()})

    @property
    def journal(self) -> list[dict[str, Any]]:
        """The journal's lines."""
        return self._journal.lines

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Freeze the plan, or check that it is the one that an earlier run froze.

        Raises:
            ResumeError: an option that changes the result differs.
        """
        path = self.path / "plan.json"
        try:
            differing = differences(dict(json.loads(path.read_text(encoding="utf-8"))), plan) if path.exists() else []
        except (ValueError, TypeError):
            raise ResumeError(f"{path}: is damaged; --no-resume begins anew") from None
        if differing and self.begun:
            raise ResumeError(
                f"{self.path}: holds an unfinished run with {differing[0]}; "
                "use the former options to go on, or --no-resume to begin anew"
            )
        if differing:
            self._journal.clear()
        if differing or not path.exists():
            write_text(path, json.dumps(plan, indent=2))

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The records of the finished blocks, in order."""
        return [line for line in self.journal if "block" in line]

    @property
    def begun(self) -> bool:
        """Whether anything was finished that a later process can go on with: a block, or a step before the first."""
        return any("block" in line or "step" in line for line in self.journal)

    @property
    def hidden_is_sound(self) -> bool:
        """Whether the hidden states of the last finished block were written since the machine was last started."""
        return bool(self.blocks) and boot_id() is not None and self.blocks[-1]["boot"] == boot_id()

    def write_block(self, index: int, tensors: Mapping[str, Tensor], packings: Mapping[str, Packing]) -> None:
        """Write a block's new tensors, by their names on disk; those that have a packing are its parts."""
        folder = self.path / "blocks"
        folder.mkdir(exist_ok=True)
        path = folder / f"{index:04d}.safetensors"
        part = path.with_suffix(".part")
        metadata = {"packings": json.dumps({name: packing.to_json() for name, packing in packings.items()})}
        write_safetensors(part, [tensor_entry(name, tensor) for name, tensor in tensors.items()], metadata)
        into_place(part, path)

    def block_tensors(self, index: int) -> dict[str, Info]:
        """Return where the new tensors of a finished block lie."""
        tensors, metadata = read_header(self.path / "blocks" / f"{index:04d}.safetensors")
        packings = json.loads(metadata.get("packings", "{}"))
        return with_packed(tensors, {name: Packing.from_json(name, entry) for name, entry in packings.items()})

    def install(self) -> None:
        """Rename what was written to ``output/`` to its final place, and remove the run directory.

        Raises:
            OutputError: the disk refuses.
        """
        try:
            if self.output.exists():
                if any(self.output.iterdir()):
                    os.replace(self.output, self.path / "former")
                else:
                    self.output.rmdir()
            into_place(self.path / "output", self.output)
        except OSError as error:
            self._put_back()
            raise OutputError(
                f"{self.output}: cannot be put in place ({error.strerror}); it lies in {self.path}, and the same "
                "command puts it in place"
            ) from error
        self.forget()

    def _put_back(self) -> None:
        """After an error, OUTPUT is what it was."""
        written, former = self.path / "output", self.path / "former"
        with suppress(OSError):
            if self.output.exists() and not written.exists():
                os.replace(self.output, written)
            if former.exists() and not self.output.exists():
                os.replace(former, self.output)

    def forget(self) -> None:
        """Remove the run directory and give up its lock."""
        self._empty()
        self.release()
        (self.path / "lock").unlink(missing_ok=True)
        self.path.rmdir()

    def release(self) -> None:
        """Give up the lock."""
        self._lock.release()

    def close(self) -> None:
        """Leave: keep what a later run can use, remove a directory in which no block was finished."""
        if self._lock.is_locked:
            if self.begun:
                self.release()
            else:
                self.forget()


@contextmanager
def run_of(output: Path, resume: bool = True) -> Iterator[RunDirectory]:
    """Open the run directory of an output for a while; where the output is a link, that of where it leads.

    Raises:
        OutputError: the disk refuses, or another process works on this output.
    """
    run = RunDirectory(output.resolve() if output.is_symlink() else output, resume)
    try:
        yield run
    except OSError as error:
        raise OutputError(f"{error.filename or run.path}: {unwritable(error)}") from error
    finally:
        run.close()


def run_path(output: Path) -> Path:
    """Return the path of an output's run directory.

    Raises:
        OutputError: the output is ``.`` or ``..``, beside which nothing can lie.
    """
    if not output.name or output.name == "..":
        raise OutputError(f"{output}: OUTPUT needs a name of its own; give the directory's name")
    return output.with_name(output.name + ".secateur")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name what differs between two plans, of all that changes the result: option, old and new value."""
    found = []
    for key in sorted((old.keys() | new.keys()) - COMMENTS):
        before, now = old.get(key), json.loads(json.dumps(new.get(key)))
        digests = [value.get("digest") for value in (before, now) if isinstance(value, dict)]
        if len(digests) == 2 and digests[0] is not None and digests[0] == digests[1]:
            continue  # the same bytes, however they are called
        if before != now or (key == "allocation" and json.dumps(before) != json.dumps(now)):
            if isinstance(before, dict) and isinstance(now, dict):
                inner = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k)]
                inner.sort(key=lambda k: (k == "digest", k == "tokens", k))
                if not inner:
                    found.append(f"{key} in another order: {list(before)!r}, not {list(now)!r}")
                    continue
                found.append(f"{key} {inner[0]} {before.get(inner[0])!r}, not {now.get(inner[0])!r}")
            else:
                found.append(f"{key} {before!r}, not {now!r}")
    return found


def finished_result(output: Path, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the report of an output that holds the finished result of this very plan; None if there is no output.

    Raises:
        ResumeError: it holds the result of another plan.
    """
    finished = report_of(output) if output.exists() else None
    if finished is None:
        return None
    if differing := differences(finished["plan"], plan):
        raise ResumeError(
            f"{output}: holds the result of a plan with {differing[0]}; choose another OUTPUT, or --overwrite it"
        )
    log.info("%s: holds the finished result of this plan already; nothing to do", output)
    return finished


def report_of(output: Path) -> dict[str, Any] | None:
    """Return the report that a finished output holds, or None if it is not one of ours."""
    path = output / REPORT
    if not path.is_file():
        return None
    try:
        report: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return report if isinstance(report, dict) and isinstance(report.get("plan"), dict) and "schema" in report else None

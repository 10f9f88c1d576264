"""One model under comparison: made as a cell says, measured, and forgotten; what was measured is in a journal."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ResumeError, SecateurError
from ..models.disk_host import DiskHost
from ..models.gguf import as_checkpoint
from ..models.shards import digest
from ..models.source import load_tokenizer, locate, open_checkpoint
from ..pipeline.calibration import Tokens, evaluation_windows, usual_windows
from ..pipeline.files import Journal
from ..pipeline.machine import choose_device, processor, reset_peak_memory
from ..pipeline.plan import Request, written_dtype
from ..pipeline.prune import prune_checkpoint
from ..pipeline.self_text import tokens_for
from ..progress import Progress
from ..shrinking.shrink import shrink_checkpoint
from .fidelity import Reading
from .generation import prepare_generations, sample_generations
from .grid import Cell
from .perplexity import perplexity
from .questions import Questions
from .speed import Measurement, measure_speed
from .tasks import TaskOptions, measure_tasks

PRUNED = "pruned"  # the measurement that pruning or shrinking itself is
OF_PRUNING = (
    "seqlen", "propagate", "format", "values", "dtype", "include", "exclude", "device", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is the same for every cell.

    Attributes:
        text: a SOURCE, for perplexity.
        windows: of it; None is 40, or as many as there are.
        seqlen: of windows and of calibration; None is min(2048, context).
        propagate, format, values, include, exclude: of pruning; shrinking has no use for them.
        dtype: of the written tensors.
        tasks: to be answered, or None.
        bench: what is timed, or None.
        generations: how many texts each model goes on with.
        device, trust_remote_code: of everything.
        record: hears of the evaluation of each dense model, and of its directory.
    """

    text: str
    windows: int | None = None
    seqlen: int | None = None
    propagate: str = "block"
    format: str = "bitmask"
    values: str | None = None
    dtype: str = "auto"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    tasks: TaskOptions | None = None
    bench: Measurement | None = None
    generations: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    record: Callable[[Path, dict[str, Any]], None] | None = None

    @property
    def pruning(self) -> dict[str, Any]:
        """Those that pruning takes, and a `Request` checks."""
        return {name: getattr(self, name) for name in OF_PRUNING}

    def check(self) -> None:
        """Raise SecateurError for what can be refused before a model is opened."""
        Questions(self.text, self.seqlen, self.windows, self.tasks, self.generations).check()


class Subject:
    """One model, and what of it is shared between cells: its windows, calibration tokens, dense predictions."""

    def __init__(self, name: str, conditions: Conditions, work: Path, journal: Journal, progress: Progress) -> None:
        self.name, self.conditions, self.work = name, conditions, work
        self.journal, self.progress = journal, progress
        trusted = conditions.trust_remote_code
        self.work.mkdir(exist_ok=True)
        path = locate(name, trusted)
        self.directory = as_checkpoint(path, self.work, written_dtype(conditions.dtype))
        self.checkpoint = open_checkpoint(self.directory, trusted)
        self.digest = digest(self.checkpoint.files if path.is_dir() else [path])
        if path.is_file() and conditions.dtype != "auto":  # which a file of rounded weights is opened in
            self.digest += f" in {conditions.dtype}"
        self.device = choose_device(conditions.device)
        self.tokenizer = load_tokenizer(self.directory, trusted)
        self.host = DiskHost(self.checkpoint, self.device)
        text = conditions.text, self.tokenizer, self.host.model.config, conditions.seqlen
        self.windows = (
            usual_windows(*text) if conditions.windows is None else evaluation_windows(*text, conditions.windows)
        )
        if conditions.generations:
            prepare_generations(self.directory, self.windows, conditions.generations, trust_remote_code=trusted)
        self._tokens: dict[tuple[Any, ...], Tokens] = {}
        self._dense: Reading | None = None

    def measure(self, cell: Cell | None) -> None:
        """Make every measurement of one cell that no earlier process made."""
        key, wanted = self._key(cell), self._wanted(cell)
        missing = [what for what, settings in wanted.items() if self._find(key, what, settings) is None]
        if not missing:
            return
        with self._made(cell, key) as directory:
            for what in missing:
                if what != PRUNED:
                    self._note(key, what, wanted[what], self._measured(cell, what, directory))

    def known(self, cell: Cell | None) -> dict[str, Any]:
        """Return the measurements of one cell that were made, by their names."""
        try:
            key = self._key(cell)
        except SecateurError:  # its calibration cannot be read
            return {}
        found = {what: self._find(key, what, settings) for what, settings in self._wanted(cell).items()}
        return {what: result for what, result in found.items() if result is not None}

    def close(self) -> None:
        """Let go of the dense model's predictions."""
        if self._dense:
            self._dense.close()

    def _key(self, cell: Cell | None) -> dict[str, Any]:
        """All that decides a pruned or shrunken model."""
        if cell is None:
            return {"model": self.digest}
        c, tokens = self.conditions, self._calibration(cell)
        if cell.shrinks:
            request = cell.shrink_request(c.pruning)
            seed = request.seed if request.by_chance else None
            decisive = {k: v for k, v in {**request.record, "seed": seed}.items() if v is not None}
            return {"model": self.digest, "shrink": decisive, "calibration": tokens.digest if tokens else None}
        parts = {name: list(getattr(c, name)) for name in ("include", "exclude") if getattr(c, name)}
        return {
            "model": self.digest, "method": cell.method, "pattern": cell.pattern, "sparsity": cell.sparsity,
            "calibration": tokens.digest if tokens else None, "propagate": c.propagate if tokens else None,
            "format": c.format, "values": c.values, "dtype": c.dtype, **parts,
        }  # fmt: skip

    def _wanted(self, cell: Cell | None) -> dict[str, dict[str, Any]]:
        """What is to be measured, with all that decides each figure."""
        c = self.conditions
        wanted: dict[str, dict[str, Any]] = {} if cell is None else {PRUNED: {}}
        wanted["evaluation"] = {"windows": self.windows.digest}
        if c.tasks:
            wanted["tasks"] = {**asdict(c.tasks), "data": c.tasks.data and digest(sorted(c.tasks.data.glob("*.jsonl")))}
        if c.generations:
            wanted["generations"] = {"windows": self.windows.digest, "count": c.generations}
        if c.bench:
            wanted["bench"] = {**asdict(c.bench), "processor": processor()}
        plain: dict[str, dict[str, Any]] = json.loads(json.dumps(wanted))
        return plain

    def _find(self, key: dict[str, Any], what: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        for line in self.journal.lines:
            if (line["cell"], line["what"], line["settings"]) == (key, what, settings):
                result: dict[str, Any] = line["result"]
                return result
        return None

    def _note(self, key: dict[str, Any], what: str, settings: dict[str, Any], result: Any) -> None:
        self.journal.note({"cell": key, "what": what, "settings": settings, "result": result})

    @contextmanager
    def _made(self, cell: Cell | None, key: dict[str, Any]) -> Iterator[Path]:
        """A directory with the model of one cell, for a while."""
        if cell is None:
            yield self.directory
            return
        target = self.work / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        reset_peak_memory()
        make = self._making(cell, target)
        try:
            report = make()
        except ResumeError:  # what was left there was made with other threads, or is damaged
            shutil.rmtree(target, ignore_errors=True)
            report = make(resume=False)
        if self._find(key, PRUNED, {}) is None:
            self._note(key, PRUNED, {}, _summary(report))
        yield target
        shutil.rmtree(target)

    def _making(self, cell: Cell, target: Path) -> Callable[..., dict[str, Any]]:
        """What makes the model of a cell, and returns its report."""
        source, common, tokens = str(self.directory), self.conditions.pruning, self._calibration(cell)
        if cell.shrinks:
            cut = cell.shrink_request(common, tokens)
            return partial(shrink_checkpoint, source, target, cut, self.progress, tokenizer=self.tokenizer)
        request = Request(
            method=cell.method, pattern=cell.pattern, sparsity=cell.sparsity, calibration=tokens, seed=cell.seed or 0,
            **common,
        )  # fmt: skip
        return partial(prune_checkpoint, source, target, request, self.progress, tokenizer=self.tokenizer)

    def _measured(self, cell: Cell | None, what: str, directory: Path) -> Any:
        c, trusted = self.conditions, self.conditions.trust_remote_code
        if what == "evaluation":
            return self._evaluated(cell, directory)
        if what == "tasks":
            assert c.tasks is not None
            return measure_tasks(directory, c.tasks, self.device, self.progress, trust_remote_code=trusted)
        if what == "generations":
            return sample_generations(
                directory, self.windows, c.generations, self.device, self.progress, trust_remote_code=trusted
            )
        assert c.bench is not None
        dense = (self.name, self.directory)
        timed = [dense] if cell is None else [(str(cell), directory), dense]
        return measure_speed(timed, c.bench, self.progress, trust_remote_code=trusted)

    def _evaluated(self, cell: Cell | None, directory: Path) -> dict[str, Any]:
        if cell is None:
            found = self._read_dense()
            if self.conditions.record:
                self.conditions.record(self.directory, found)
            return found
        if self._dense is None:  # the dense figures are known from an earlier process, its predictions are not
            self._read_dense()
        host = DiskHost(open_checkpoint(directory, self.conditions.trust_remote_code), self.device)
        reading = Reading(host, self.windows, self.work / "reading")
        try:
            return perplexity(reading, self.progress, dense=self._dense)
        finally:
            reading.close()

    def _read_dense(self) -> dict[str, Any]:
        """Let the dense model read the windows; what it makes of them is kept if it came to the end."""
        reading = Reading(self.host, self.windows, self.work / "dense")
        found = perplexity(reading, self.progress, keep=True)
        self._dense = reading
        return found

    def _calibration(self, cell: Cell) -> Tokens | None:
        if cell.calibration is None:
            return None
        key = (cell.calibration, cell.samples, cell.seed)
        if key not in self._tokens:
            self._tokens[key] = tokens_for(
                self.host, cell.calibration, self.tokenizer, cell.samples, self.conditions.seqlen, cell.seed or 0,
                self.progress,
            )  # fmt: skip
        return self._tokens[key]


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """What a comparison keeps of a run's report."""
    kept = {
        "peak_memory_bytes": report["peak_memory_bytes"],
        "bytes": report["bytes"],
        "calibration": report["plan"]["calibration"],
        "threads": torch.get_num_threads(),
        "software": report["plan"]["software"],
    }
    if "parameters" in report:  # parts were removed
        left, all_ = report["parameters"]["blocks_after"], report["parameters"]["blocks_before"]
        own = {"sparsity": 1 - left / all_, "seconds": report["seconds"]["shrinking"], "packed": None, "left_out": 0}
    else:
        own = {
            "sparsity": report["sparsity"],
            "seconds": report["seconds"]["pruning"],
            "packed": report["packed"],
            "left_out": len(report["left_out"]),
        }
    return kept | own

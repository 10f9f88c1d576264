"""A checkpoint packed or unpacked as a whole, one block in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, OptionError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.gguf import as_checkpoint
from ..models.hosts import block_matrices
from ..models.shards import PackedInfo, digest
from ..models.source import locate, open_checkpoint
from ..progress import Progress
from .disk_run import DiskRun, name_if_packable
from .files import check_room, write_text
from .machine import software
from .output import SCHEMA, Describe, check_output, write_checkpoint
from .plan import check_format
from .run_directory import REPORT, RunDirectory, finished_result, report_of, run_of

Work = Callable[[RunDirectory, Checkpoint], list[Any]]


def pack_checkpoint(
    model: str,
    output: Path,
    format: str,
    values: str | None,
    progress: Progress,
    *,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    describe: Describe | None = None,
) -> dict[str, Any]:
    """Pack the matrices of a pruned checkpoint, losslessly but for ``values="int8"``; go on where a killed run stopped.

    Matrices that would not shrink stay dense, and so do experts.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """
    if format == "dense":
        raise OptionError("format dense: packs nothing; use bitmask or nm, or secateur unpack")
    check_format(format, values)

    def work(run: RunDirectory, source: Checkpoint) -> list[Any]:
        host = DiskHost(source, torch.device("cpu"))
        results, count = DiskRun(run, host, format, values), len(host.skeleton.real)
        progress.start("packing", count, done=results.done)
        for index in range(results.done, count):
            with host.block(index):
                matrices = block_matrices(host, index)
                for matrix in matrices.values():
                    if name := name_if_packable(host, matrix):
                        W = source.read(name)  # as it lies on disk, bit for bit
                        matrix.write(results.as_written(matrix, W.T if matrix.transposed else W))
                packed = results.packed
                results.keep(index, [m for m in matrices.values() if name_if_packable(host, m) in packed])
            dense = [name for name, m in matrices.items() if name_if_packable(host, m) not in packed]
            run.note({"block": index, "dense": dense})
            progress.advance()
        progress.finish()
        blocks = [run.block_tensors(index) for index in range(count)]
        if not any(isinstance(info, PackedInfo) for block in blocks for info in block.values()):
            run.forget()
            raise ModelError(f"{model}: no matrix of it would shrink; prune it first")
        return blocks

    what = {"command": "pack", "format": format, "values": values}
    return _rewrite(model, output, what, work, progress, overwrite, resume, trust_remote_code, describe)


def unpack_checkpoint(
    model: str,
    output: Path,
    progress: Progress,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    describe: Describe | None = None,
) -> dict[str, Any]:
    """Write a packed checkpoint dense again, as any other tool reads it.

    Raises:
        SecateurError: one line that says what, where, and what to do.
    """

    def work(run: RunDirectory, source: Checkpoint) -> list[Any]:
        if not source.packed:
            raise ModelError(f"{source.directory}: holds no packed matrices, so there is nothing to unpack")
        return []

    return _rewrite(model, output, {"command": "unpack"}, work, progress, overwrite, True, trust_remote_code, describe)


def _rewrite(
    model: str,
    output: Path,
    what: Mapping[str, Any],
    work: Work,
    progress: Progress,
    overwrite: bool,
    resume: bool,
    trust_remote_code: bool,
    describe: Describe | None,
) -> dict[str, Any]:
    path = locate(model, trust_remote_code)
    check_output(output, path, overwrite)
    with run_of(output, resume) as run:
        source = open_checkpoint(as_checkpoint(path, run.path), trust_remote_code)
        files = source.files if path.is_dir() else [path]
        plan = {**what, "model": {"name": model, "digest": digest(files)}, "software": software()}
        finished = None if overwrite else finished_result(run.output, plan)
        if finished is not None:
            run.forget()
            return finished
        run.begin(plan)
        check_room(
            run.path,
            0 if run.blocks else 2 * sum(i.weights * i.dtype.itemsize for i in source.tensors.values()),
            "this run",
        )
        blocks = work(run, source)
        target = run.path / "output"
        write_checkpoint(source, blocks, target, None, progress)
        report = _report(source, Checkpoint.open(target), plan, run.blocks)
        write_text(target / REPORT, json.dumps(report, indent=1))
        if describe:
            describe(target, source.directory)
        run.install()
        return report


def _report(
    source: Checkpoint, target: Checkpoint, plan: dict[str, Any], blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    former = report_of(source.directory)
    return {
        "schema": SCHEMA,
        "plan": plan,
        "bytes": {"source": source.bytes, "output": target.bytes},
        "packed": packed_bytes(target),
        "dense_matrices": [name for block in blocks for name in block["dense"]],
        "pruned": former.get("pruned", former) if former else None,
    }


def packed_bytes(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Bytes of the packed matrices: dense, as predicted from their sparsity, and as they are; None without any."""
    packings = [info.packing for info in checkpoint.packed.values()]
    if not packings:
        return None
    return {
        "matrices": len(packings),
        "dense": sum(info.weights * info.dtype.itemsize for info in checkpoint.packed.values()),
        "predicted": round(sum(packing.predicted_bytes for packing in packings)),
        "true": sum(packing.bytes for packing in packings),
    }

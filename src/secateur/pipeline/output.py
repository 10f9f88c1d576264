"""The pruned checkpoint as files, and the report that lies in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, OutputError, unwritable
from ..models.checkpoint import INDEX, SINGLE, Checkpoint, index_of, packed_config
from ..models.formats import Packing
from ..models.shards import Entry, Info, PackedInfo, copied_entry, packed_entries, write_safetensors
from ..progress import Progress
from .files import write_text
from .plan import Plan
from .run_directory import report_of

SCHEMA = 1
BLOCK_ENTRIES = ("block", "seconds", "output_error", "reconstruction")

Describe = Callable[[Path, Path], None]  # adds to a finished directory what people read, given that of its source

# What a model's directory holds besides weights: config, tokenizer, generation, licence.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


def check_output(output: Path, model: Path, overwrite: bool) -> None:
    """Refuse an OUTPUT that would destroy something.

    Raises:
        OutputError: it is the model, a file, or a directory that holds something else than our result.
    """
    try:
        ours, source = output.resolve(), model.resolve()
        output.exists()
    except (OSError, RuntimeError) as error:  # too long a name, or a loop of links
        raise OutputError(
            f"{str(output)[:80]}: cannot be OUTPUT ({getattr(error, 'strerror', None) or error})"
        ) from None
    if ours == source or ours in source.parents:
        raise OutputError(f"{output}: OUTPUT is (or contains) the model itself; choose another directory")
    if not output.exists():
        return
    if os.path.ismount(output):
        raise OutputError(f"{output}: something is mounted there, so it cannot be replaced; choose {output / 'NAME'}")
    if not output.is_dir():
        raise OutputError(f"{output}: is a file; OUTPUT is a directory")
    if any(output.iterdir()) and report_of(output) is None:
        hint = "--overwrite replaces only a directory that Secateur wrote" if overwrite else "choose another directory"
        raise OutputError(f"{output}: is not empty; {hint}")


def write_checkpoint(
    source: Checkpoint,
    blocks: Sequence[Mapping[str, Info]],
    target: Path,
    dtype: torch.dtype | None,
    progress: Progress,
) -> None:
    """Write a complete checkpoint: new tensors from the finished blocks, all others byte for byte from the source.

    What the blocks hold packed is written packed; what the source holds packed is unpacked.

    Shards are those of the source.

    Args:
        source: the model's files.
        blocks: for each block, where its new tensors lie.
        target: directory to be made.
        dtype: of all floating tensors; None keeps each one's own.
        progress: hears of tensors.
    """
    new = {name: info for block in blocks for name, info in block.items()}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    progress.start("writing", len(source.tensors))
    sizes: dict[str, list[tuple[str, int]]] = {}
    for shard, names in source.shards().items():
        entries: list[Entry] = []
        for name in names:
            info = new.get(name)
            if isinstance(info, PackedInfo):
                entries += packed_entries(info)
            else:
                entries.append(copied_entry(name, info or source.tensors[name], dtype))
        sizes[shard] = [(e.name, torch.Size(e.shape).numel() * e.dtype.itemsize) for e in entries]
        write_safetensors(target / shard, [_counted(entry, progress) for entry in entries])
    if set(sizes) != {SINGLE}:
        write_text(target / INDEX, index_of(sizes))
    copy_small_files(source, target, dtype)
    packings = {name: info.packing for name, info in new.items() if isinstance(info, PackedInfo)}
    _write_packings(target, packings)
    progress.finish()


def _write_packings(target: Path, packings: Mapping[str, Packing]) -> None:
    """Have ``config.json`` say what is packed, and nothing if nothing is."""
    config = json.loads((target / "config.json").read_text())
    if not packings and "quantization_config" not in config:
        return
    config.pop("quantization_config", None)
    if packings:
        config["quantization_config"] = packed_config(packings)
    write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


def _counted(entry: Entry, progress: Progress) -> Entry:
    def pieces() -> Any:
        yield from entry.pieces()
        progress.advance()

    return entry._replace(pieces=pieces)


def copy_small_files(source: Checkpoint, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy config, tokenizer, generation config and licence; the config names the dtype that was written.

    Raises:
        OutputError: the disk refuses.
    """
    try:
        for pattern in (*SMALL_FILES, *(["*.py"] if source.trust_remote_code else [])):
            for path in source.directory.glob(pattern):
                if path.is_file() and not path.name.endswith(".index.json") and path.name != "secateur.json":
                    shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise OutputError(f"{target}: {unwritable(error)}") from error
    if dtype is not None:
        config = json.loads((target / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


def make_report(plan: Plan, blocks: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Put together the report of a run (docs/json.md).

    Args:
        plan: the plan.
        blocks: the records of all blocks.
        facts: further entries: seconds, bytes, memory, evaluation.

    Raises:
        ModelError: a matrix of the plan was not pruned.
    """
    matrices = [{**matrix, "block": block["block"]} for block in blocks for matrix in block["matrices"]]
    wanted = {name for name, target in plan.job.targets.items() if target.sparsity}
    unobserved = {name for block in blocks for name in block.get("unobserved", ())}
    missing = wanted - unobserved - {matrix["name"] for matrix in matrices}
    if missing:
        raise ModelError(f"{min(missing)}: was planned and not pruned; this is a defect of Secateur, please report it")
    left_out = sorted(unobserved | {matrix.name for matrix in plan.unreadable})
    weights = sum(matrix.weights for matrix in plan.matrices + plan.unreadable)
    zeros = sum(matrix["zeros"] for matrix in matrices)
    for matrix in matrices:
        matrix["sparsity"] = matrix["zeros"] / (matrix["shape"][0] * matrix["shape"][1])
    return {
        "schema": SCHEMA,
        "plan": plan.record,
        "sparsity": zeros / weights if weights else 0.0,
        "weights": weights,
        "zeros": zeros,
        "dense_matrices": sorted(set(plan.job.targets) - wanted),
        "left_out": left_out,
        "blocks": [{key: block[key] for key in BLOCK_ENTRIES if key in block} for block in blocks],
        "matrices": matrices,
        **facts,
    }

"""The pruned checkpoint as files, and the report that lies in it."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, OutputError, unwritable
from ..models.checkpoint import INDEX, SINGLE, Checkpoint, config_of, index_of, packed_config
from ..models.formats import Packing
from ..models.shards import Entry, Info, PackedInfo, copied_entry, packed_entries, read_header, write_safetensors
from ..progress import Progress
from .files import write_text
from .plan import Plan
from .run_directory import REPORT, report_of

log = logging.getLogger("secateur")

SCHEMA = 1
BLOCK_ENTRIES = ("block", "seconds", "output_error", "reconstruction")

Describe = Callable[[Path, Path], None]  # adds to a finished directory what people read, given that of its source

# What a model's directory holds besides weights, in any case: config, tokenizer, templates, processors, licence.
LEGAL = ("licen[cs]e*", "notice*", "use_policy*")
PROCESSORS = ("*processor_config.json", "*extractor_config.json")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.tiktoken", "*.bpe", *LEGAL)
FOLDERS = {"additional_chat_templates": "*.jinja", "custom_generate": "*.py"}
# What tells of other weights than those that are written.
STALE = (
    "*.index.json", "secateur.json", "adapter_config.json", "quantize_config.json", "hf_quant_config.json",
    "params.json", "trainer_state.json", "*_results.json",
)  # fmt: skip
OTHER_WEIGHTS = ("consolidated*", "adapter_*")  # another form of the same model, or a part beside it


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
        sizes[shard] = [(entry.name, entry.size) for entry in entries]
        write_safetensors(target / shard, [_counted(entry, progress) for entry in entries])
    if set(sizes) != {SINGLE}:
        write_text(target / INDEX, index_of(sizes))
    copy_small_files(source, target)
    for path in files_beside(source, fit=True):
        copy(path, target / path.name)
    packings = {name: info.packing for name, info in new.items() if isinstance(info, PackedInfo)}
    _write_config(target, packings, dtype)
    progress.finish()


def _write_config(target: Path, packings: Mapping[str, Packing], dtype: torch.dtype | None) -> None:
    """Have ``config.json`` say in which files, formats and dtype the weights were written, and nothing else of it."""
    former = config_of(target)
    config = {key: value for key, value in former.items() if key not in ("quantization_config", "transformers_weights")}
    if packings:
        config["quantization_config"] = packed_config(packings)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if config != former:
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n")


def _counted(entry: Entry, progress: Progress) -> Entry:
    def pieces() -> Any:
        yield from entry.pieces()
        progress.advance()

    return entry._replace(pieces=pieces)


def copy_small_files(source: Checkpoint, target: Path) -> None:
    """Copy config, tokenizer, chat templates, processors, generation config and licence.

    Raises:
        OutputError: the disk refuses.
    """
    for path in small_files(source.directory, SMALL_FILES, code=source.trust_remote_code):
        copy(path, target / path.relative_to(source.directory))


def small_files(directory: Path, patterns: Sequence[str], *, code: bool = False) -> list[Path]:
    """Return the files of a model's directory that fit a pattern and belong to its weights.

    Args:
        directory: The model's directory.
        patterns: Shell patterns; file names are compared in lower case.
        code: Include the model's Python code.
    """
    patterns = (*patterns, *(["*.py"] if code else []))
    found = [path for path in directory.iterdir() if _fits(path, patterns) and not _fits(path, STALE)]
    for folder, pattern in FOLDERS.items():
        if pattern in patterns:
            found += [path for path in directory.glob(f"{folder}/*") if _fits(path, [pattern])]
    return sorted(path for path in found if path.is_file())


def _fits(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns)


def files_beside(source: Checkpoint, *, fit: bool) -> list[Path]:
    """Return the safetensors files that go with a checkpoint, and say which files beside it do not.

    Args:
        source: the checkpoint.
        fit: whether such files fit what is written: not a model with fewer parts.
    """
    shards = {info.path for info in source.tensors.values()}
    files = [path for path in sorted(source.directory.glob("*.safetensors")) if path not in shards]
    beside = [path for path in files if fit and not _fits(path, OTHER_WEIGHTS) and _holds_others(path, source.tensors)]
    stale = [path for path in source.directory.iterdir() if _fits(path, STALE) and path.name not in (INDEX, REPORT)]
    if left := sorted({path.name for path in (*files, *stale)} - {path.name for path in beside}):
        log.info("left out, since they belong to other weights than those that are written: %s", ", ".join(left))
    return beside


def _holds_others(path: Path, tensors: Mapping[str, Info]) -> bool:
    """Whether a sound safetensors file holds none of the model's tensors."""
    try:
        return read_header(path)[0].keys().isdisjoint(tensors)
    except ModelError:
        return False


def copy(path: Path, target: Path) -> None:
    """Copy a small file.

    Raises:
        OutputError: the disk refuses.
    """
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    except OSError as error:
        raise OutputError(f"{target.parent}: {unwritable(error)}") from error


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

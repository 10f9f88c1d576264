"""A checkpoint seen otherwise: with another config, with fewer blocks; its tensors stay where they lie."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..models.checkpoint import Checkpoint
from ..models.disk_host import DiskHost
from ..models.shards import Info
from ..models.source import first_line
from ..pipeline.files import write_text
from ..pipeline.output import copy_small_files


def with_config(source: Checkpoint, config: Mapping[str, Any], folder: Path) -> Checkpoint:
    """Return the same tensors under another config, which is written to `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_small_files(source, folder)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return replace(source, directory=folder)


def smaller_model(view: Checkpoint, host: DiskHost, kept: Sequence[int] | None = None) -> DiskHost:
    """Open a view of a host's checkpoint as a model, without the weights of its blocks.

    Args:
        view: the smaller checkpoint.
        host: the whole model, whose blocks were run.
        kept: which of its blocks the smaller one has; None for all.

    Raises:
        ModelError: transformers makes no model of its config.
    """
    try:
        small = DiskHost(view, host.device, host.dtype)
        for place, index in enumerate(range(len(host.skeleton.real)) if kept is None else kept):
            if index in host.skeleton.companions:
                small.skeleton.companions[place] = host.skeleton.companions[index]
        return small
    except Exception as error:  # whatever a family's config and model refuse
        kind, why = host.model.config.get_text_config().model_type, first_line(error)
        why = why.removeprefix(f"{view.directory}: ")
        raise ModelError(f"{kind}: transformers makes no model of the smaller config ({why})") from error


def with_tensors(source: Checkpoint, new: Mapping[str, Info], gone: Collection[str]) -> Checkpoint:
    """Return a checkpoint with some tensors exchanged, and some gone; new ones belong to the former's shards."""
    homes = {**{name: source.tensors[name].path.name for name in new}, **source.homes}
    tensors = {name: new.get(name, info) for name, info in source.tensors.items() if name not in gone}
    return replace(source, tensors=tensors, homes={n: home for n, home in homes.items() if n in tensors})


def without_blocks(host: DiskHost, removed: Collection[int], config: Mapping[str, Any], folder: Path) -> Checkpoint:
    """Return a host's checkpoint without some of its blocks; those after them are renumbered.

    Raises:
        ModelError: the names of its tensors do not tell their block's number.
    """
    source, stack = host.checkpoint, host.skeleton.path.rpartition(".")[2]
    kept = [index for index in range(len(host.skeleton.real)) if index not in removed]
    renamed: dict[str, str] = {name: name for name in host.names[None]}
    for place, index in enumerate(kept):
        for name in host.names.get(index, []):
            new, found = re.subn(rf"(^|\.){re.escape(stack)}\.{index}\.", rf"\g<1>{stack}.{place}.", name, count=1)
            if not found:
                raise ModelError(f"{name}: does not tell the number of its block, so blocks cannot be renumbered")
            renamed[name] = new
    tensors = {renamed[name]: info for name, info in source.tensors.items() if name in renamed}
    homes = {renamed[name]: home for name, home in source.homes.items() if name in renamed}
    return with_config(replace(source, tensors=tensors, homes=homes), config, folder)

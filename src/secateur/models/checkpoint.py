"""A Hugging Face checkpoint: which tensors a directory holds, in which shards, and which of them are packed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import ModelError
from .formats import Packing
from .shards import Info, PackedInfo, TensorInfo, read_header, read_tensor, with_packed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANT_METHOD, VERSION = "secateur", 1  # of packed checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors checkpoint in a directory.

    Attributes:
        directory: where config, tokenizer and shards lie.
        tensors: every tensor of the checkpoint, by its name on disk.
        trust_remote_code: the user allowed the Python code that comes with the model.
        homes: the shards that tensors are to be written to; of all others, that in which they lie.
    """

    directory: Path
    tensors: Mapping[str, Info]
    trust_remote_code: bool = False
    homes: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def open(directory: Path, trust_remote_code: bool = False) -> Checkpoint:
        """Open a directory and check every shard's header.

        Raises:
            ModelError: there are no safetensors weights, a shard is missing, or a header or packing is unsound.
        """
        tensors: dict[str, TensorInfo] = {}
        for shard in shard_names(directory):
            tensors |= read_header(directory / shard)[0]
        return Checkpoint(directory, with_packed(tensors, read_packings(directory)), trust_remote_code)

    def read(self, name: str) -> Tensor:
        """Read one tensor by its name on disk."""
        return read_tensor(self.tensors[name])

    def shards(self) -> dict[str, list[str]]:
        """Return each shard's file name with the names of its tensors, in the order of their first bytes."""
        grouped: dict[str, list[str]] = {}
        for name, info in sorted(self.tensors.items(), key=lambda item: item[1].begin):
            grouped.setdefault(self.homes.get(name, info.path.name), []).append(name)
        return dict(sorted(grouped.items()))

    @property
    def files(self) -> list[Path]:
        """Config and shards: what defines the model."""
        return [self.directory / name for name in ("config.json", *self.shards())]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def packed(self) -> dict[str, PackedInfo]:
        """The packed matrices, by name."""
        return {name: info for name, info in self.tensors.items() if isinstance(info, PackedInfo)}


def read_packings(directory: Path) -> dict[str, Packing]:
    """Return what a directory's ``config.json`` says of packed matrices; nothing if it is not packed by Secateur.

    Raises:
        ModelError: it was packed in a later version of the format, or an entry is unsound.
    """
    try:
        packed = json.loads((directory / "config.json").read_text()).get("quantization_config") or {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # others say what is wrong with it
    ours = isinstance(packed, dict) and packed.get("quant_method") == QUANT_METHOD
    return parse_packings(packed, str(directory)) if ours else {}


def parse_packings(packed: Mapping[str, Any], where: str) -> dict[str, Packing]:
    """Read the ``quantization_config`` of a packed checkpoint.

    Raises:
        ModelError: it was packed in a later version of the format, or an entry is unsound.
    """
    if packed.get("version") != VERSION:
        raise ModelError(
            f"{where}: packed in version {packed.get('version')!r} of the format; install a newer Secateur"
        )
    matrices = packed.get("matrices")
    if not isinstance(matrices, dict):
        raise ModelError(f"{where}: config.json names no packed matrices; pack or download the model again")
    return {name: Packing.from_json(name, entry) for name, entry in matrices.items()}


def packed_config(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a packed checkpoint."""
    matrices = {name: packing.to_json() for name, packing in packings.items()}
    return {"quant_method": QUANT_METHOD, "version": VERSION, "matrices": matrices}


def shard_names(directory: Path) -> list[str]:
    """Return the file names of a directory's safetensors shards.

    Raises:
        ModelError: there are none, one is missing, or the index names a file outside the directory.
    """
    index = directory / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError):
            raise ModelError(f"{index}: not an index of shards; download the model again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name:
                raise ModelError(f"{index}: names a file outside the model's directory: {name!r}")
            if not os.path.isfile(directory / name):  # False for a name that no file can have
                raise ModelError(f"{directory}: shard {_shown(name)} is missing; download the model again")
        if names:
            return names
    if (directory / SINGLE).exists():
        return [SINGLE]
    if any(directory.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{directory}: only pickled weights (pytorch_model.bin), which Secateur does not open; load the model with "
            "transformers and save_pretrained it once"
        )
    if (directory / SINGLE).is_symlink():
        raise ModelError(f"{directory}: {SINGLE} is a link that leads nowhere; download the model again")
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    found = f"; {others[0]} is there, but no index names it" if others else ""
    raise ModelError(f"{directory}: no safetensors weights (model.safetensors or an index of shards){found}")


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def index_of(shards: Mapping[str, Iterable[tuple[str, int]]]) -> str:
    """Return the text of an index for shards of (tensor name, bytes)."""
    weight_map = {name: shard for shard, tensors in shards.items() for name, _ in tensors}
    total = sum(size for tensors in shards.values() for _, size in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)

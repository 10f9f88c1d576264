"""A Hugging Face checkpoint: which tensors a directory holds, in which shards, and which of them are packed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .formats import Packing
from .shards import (
    Info,
    PackedInfo,
    TensorInfo,
    cast_whole,
    is_cast,
    read_header,
    read_tensor,
    refuse_pointer,
    with_packed,
)

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

    def check_cast(self, dtype: torch.dtype | None) -> None:
        """Raise NumericsError if a tensor has numbers that are too large for a dtype; None keeps each tensor's own."""
        if dtype != torch.float16:  # bfloat16 has the range of float32
            return
        for name, info in self.tensors.items():
            if is_cast(info, dtype):
                cast_whole(name, info, dtype)

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


def config_of(directory: Path) -> dict[str, Any]:
    """Return the contents of a directory's ``config.json``; nothing if it cannot be read, which others say."""
    try:
        found: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_packings(directory: Path) -> dict[str, Packing]:
    """Return what a directory's ``config.json`` says of packed matrices; nothing if it is not packed by Secateur.

    Raises:
        ModelError: it was packed in a later version of the format, or an entry is unsound.
    """
    packed = config_of(directory).get("quantization_config") or {}
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

    They are chosen as transformers does: the file that config.json names (``transformers_weights``), else
    ``model.safetensors``, else what the index names.

    Raises:
        ModelError: there are none, one is missing, or config.json or the index names a file outside the directory.
    """
    named = config_of(directory).get("transformers_weights")
    if named is None and (directory / SINGLE).is_file():
        return [SINGLE]
    if named is not None and not str(named).endswith(".index.json"):
        return [_inside(directory, named, directory / "config.json")]
    index = directory / (INDEX if named is None else _inside(directory, named, directory / "config.json"))
    if index.exists():
        refuse_pointer(index)
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError):
            raise ModelError(f"{index}: not an index of shards; download the model again") from None
        if names:
            return [_inside(directory, name, index) for name in names]
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


def has_weights(directory: Path) -> bool:
    """Whether a directory holds safetensors weights under one of the names that transformers looks for."""
    return "transformers_weights" in config_of(directory) or any(
        (directory / name).exists() for name in (SINGLE, INDEX)
    )


def _inside(directory: Path, name: Any, where: Path) -> str:
    """Return the name of a file that must lie in the directory itself."""
    if not isinstance(name, str) or Path(name).name != name or "\\" in name:
        raise ModelError(f"{where}: names a file outside the model's directory: {name!r}")
    if not os.path.isfile(directory / name):  # False for a name that no file can have
        raise ModelError(f"{directory}: shard {_shown(name)} is missing; download the model again")
    return name


# What a state dict has in its names where a model was saved inside of what torch or peft had wrapped it in.
WRAPPED = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.|^base_model\.model\."
)


def missing_tensors(directory: Path, missing: Sequence[str], held: Iterable[str]) -> ModelError:
    """Return the error for tensors that a checkpoint lacks, where it `held` others that the model does not have."""
    for name in held:
        if WRAPPED.sub("", name) in missing:
            return ModelError(
                f"{directory}: its tensors are named as inside of a wrapper ({name}); save the model itself, such as "
                "model._orig_mod of a compiled one"
            )
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return ModelError(f"{directory}: the checkpoint has no {missing[0]}{others}; is it complete?")


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def index_of(shards: Mapping[str, Iterable[tuple[str, int]]]) -> str:
    """Return the text of an index for shards of (tensor name, bytes)."""
    weight_map = {name: shard for shard, tensors in shards.items() for name, _ in tensors}
    total = sum(size for tensors in shards.values() for _, size in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)

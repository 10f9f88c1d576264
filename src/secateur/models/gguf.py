"""A GGUF file as a checkpoint: dequantised once by transformers, and checked, since it says little by itself."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from ..errors import ModelError, OutputError
from .shards import digest
from .source import first_line, quiet_transformers

log = logging.getLogger("secateur")


def as_checkpoint(path: Path, scratch: Path, dtype: torch.dtype | None = None) -> Path:
    """Return a directory of safetensors for a directory (itself) or a ``.gguf`` file (dequantised in `scratch`).

    A GGUF file is dequantised once, to `dtype` or bfloat16, with its tokenizer.

    Raises:
        ModelError: transformers cannot read the file.
        OutputError: the scratch directory cannot be written.
    """
    if path.is_dir():
        return path
    if part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name):
        raise ModelError(
            f"{path}: one part of {int(part[2])}; join them with: llama-gguf-split --merge {path.name} WHOLE.gguf"
        )
    dtype = dtype or torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    target = scratch / f"source-{digest([path])[:12]}-{name}"
    if target.exists():
        return target
    log.info("%s: dequantising once to %s", path.name, name)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    half_written = target.with_suffix(".part")
    shutil.rmtree(half_written, ignore_errors=True)
    with quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, by name
            )
            model, found = loaded
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # the readers of a damaged file raise whatever they stumble over
            raise ModelError(f"{path}: transformers cannot open this GGUF file ({first_line(error)[:200]})") from None
        _check_all_was_read(path, model, found)
        try:
            model.save_pretrained(half_written)
            tokenizer.save_pretrained(half_written)
            (half_written / "README.md").write_text(_card(path), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{scratch}: the GGUF file cannot be dequantised there ({first_line(error)})") from error
    half_written.rename(target)
    return target


def _card(path: Path) -> str:
    """The little that a GGUF file says of its model's licence, as the head of a model card."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    known = {"license": "general.license", "license_name": "general.license.name",
             "license_link": "general.license.link", "language": "general.languages"}  # fmt: skip
    facts = {key: fields[name].contents() for key, name in known.items() if name in fields}
    return f"---\n{yaml.safe_dump(facts)}---\n" if facts else ""


def _check_all_was_read(path: Path, model: Any, found: dict[str, Any]) -> None:
    """Refuse a GGUF file of which transformers made another model: it invents what it misses, and drops the rest."""
    if found["missing_keys"]:
        raise ModelError(f"{path}: holds no {min(found['missing_keys'])}, or transformers does not know it there")
    if found["mismatched_keys"]:
        name, held, expected = min(found["mismatched_keys"], key=str)
        raise ModelError(
            f"{path}: {name} has the shape {tuple(held)}, where transformers reads {tuple(expected)} out of the file's "
            "metadata; prune the original checkpoint instead"
        )
    import gguf

    reader = gguf.GGUFReader(path)
    sizes: dict[str, int] = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    rotary = [name for name in (*sizes, *reader.fields) if re.search(r"^rope_|\.rope\.scaling\.factor$", name)]
    if rotary:
        log.warning("%s: transformers does not read %s; rotary positions are not scaled", path, ", ".join(rotary))
    blocks = model.config.num_hidden_layers  # those after them predict further tokens
    extra = [name for name in sizes if (block := re.match(r"blk\.(\d+)\.", name)) and int(block[1]) >= blocks]
    weights = sum(size for name, size in sizes.items() if name not in (*rotary, *extra))
    unique = sum(parameter.numel() for parameter in model.parameters())
    with_ties = sum(tensor.numel() for tensor in model.state_dict().values())  # a file may hold a tied head twice
    if weights not in (unique, with_ties):
        raise ModelError(
            f"{path}: transformers reads {unique:,} of its {weights:,} weights, so this would be another model; "
            "prune the original checkpoint instead"
        )

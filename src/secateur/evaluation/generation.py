"""A few words by a model, for a quick look with one's own eyes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, OptionError
from ..models.source import load_model, load_tokenizer, open_checkpoint, read_config
from ..pipeline.calibration import Tokens, context_length
from ..progress import Progress

PROMPT_TOKENS = 32
NEW_TOKENS = 64
REPEATED = 4  # tokens in a row that count as said before


def continue_text(
    directory: Path, prompt: str, new_tokens: int, device: torch.device, *, trust_remote_code: bool = False
) -> str:
    """Return what the model in `directory` writes after `prompt`, always taking the likeliest token.

    Raises:
        DataError: the prompt is empty, or the model has no tokenizer.
    """
    tokenizer = _tokenizer(directory, trust_remote_code)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is no UTF-8 text") from None
    ids_T = tokenizer(prompt, return_tensors="pt")["input_ids"][0]
    if len(ids_T) == 0:
        raise DataError("the prompt is empty")
    context, length = _context(directory, trust_remote_code), len(ids_T) + new_tokens
    if context is not None and length > context:
        raise OptionError(
            f"tokens {new_tokens}: with the prompt's they are {length}, the model's context has {context}"
        )
    model = _model(directory, device, trust_remote_code)
    text: str = tokenizer.decode(_continued(model, tokenizer, ids_T, new_tokens), skip_special_tokens=True)
    return text


def sample_generations(
    directory: Path,
    tokens: Tokens,
    count: int,
    device: torch.device,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Let a model go on with the beginnings of `count` windows of a text, always taking the likeliest token.

    Args:
        directory: the model.
        tokens: the windows; `count` of them, evenly spaced, begin with the prompts.
        count: how many.
        device: where to compute.
        progress: hears of every text.
        trust_remote_code: let Python code that comes with the model run.

    Returns:
        For each prompt, continuation and repetition (`repetition`).

    Raises:
        DataError: the model has no tokenizer.
        OptionError: there are fewer windows, or the context has no room.
    """
    tokenizer, prompts, new = prepare_generations(directory, tokens, count, trust_remote_code=trust_remote_code)
    model = _model(directory, device, trust_remote_code)
    found = []
    progress.start("generating", count)
    for ids_T in prompts:
        new_T = _continued(model, tokenizer, ids_T, new)
        found.append(
            {
                "prompt": tokenizer.decode(ids_T, skip_special_tokens=True),
                "continuation": tokenizer.decode(new_T, skip_special_tokens=True),
                "repetition": repetition(new_T.tolist()),
            }
        )
        progress.advance()
    progress.finish()
    return found


def prepare_generations(
    directory: Path, tokens: Tokens, count: int, *, trust_remote_code: bool = False
) -> tuple[Any, list[Tensor], int]:
    """Return the tokenizer, the prompts and the number of new tokens; raise what `sample_generations` does."""
    if not 1 <= count <= len(tokens.rows):
        raise OptionError(f"generations {count}: {tokens.source} has {len(tokens.rows)} windows to begin with")
    tokenizer = _tokenizer(directory, trust_remote_code)
    prompts = [tokens.rows[number * len(tokens.rows) // count][:PROMPT_TOKENS] for number in range(count)]
    new = min(NEW_TOKENS, (_context(directory, trust_remote_code) or 2 * NEW_TOKENS) - max(map(len, prompts)))
    if new < 1:
        raise OptionError(f"generations: the model's context of {len(prompts[0])} tokens leaves no room to go on")
    return tokenizer, prompts, new


def repetition(ids: Sequence[int]) -> float:
    """Return the share of the 4-token sequences of a text that have occurred in it before.

    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    sequences = [tuple(ids[start : start + REPEATED]) for start in range(len(ids) - REPEATED + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def _tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    open_checkpoint(directory, trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    if tokenizer is None:
        raise DataError(f"{directory}: has no tokenizer, so it cannot read a prompt")
    return tokenizer


def _context(directory: Path, trust_remote_code: bool) -> int | None:
    return context_length(read_config(directory, trust_remote_code))


def _model(directory: Path, device: torch.device, trust_remote_code: bool) -> Any:
    model = load_model(directory, torch.float32 if device.type == "cpu" else "auto", trust_remote_code)
    return model.to(device).eval()


def _continued(model: Any, tokenizer: Any, ids_T: Tensor, new_tokens: int) -> Tensor:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids_1T = ids_T[None].to(model.device)
    with torch.no_grad():
        out_1T: Tensor = model.generate(
            input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=pad,
        )  # fmt: skip
    return out_1T[0, ids_1T.shape[1] :]

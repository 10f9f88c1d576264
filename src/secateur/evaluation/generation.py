"""A few words by a model, for a quick look with one's own eyes."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import DataError, OptionError
from ..models.source import load_model, load_tokenizer, open_checkpoint
from ..pipeline.calibration import context_length


def continue_text(
    directory: Path, prompt: str, new_tokens: int, device: torch.device, *, trust_remote_code: bool = False
) -> str:
    """Return what the model in `directory` writes after `prompt`, always taking the likeliest token.

    Raises:
        DataError: the prompt is empty, or the model has no tokenizer.
    """
    from transformers import AutoConfig

    open_checkpoint(directory, trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    if tokenizer is None:
        raise DataError(f"{directory}: has no tokenizer, so it cannot read a prompt")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt is no UTF-8 text") from None
    batch = tokenizer(prompt, return_tensors="pt").to(device)
    if batch["input_ids"].shape[1] == 0:
        raise DataError("the prompt is empty")
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    context, length = context_length(config), batch["input_ids"].shape[1] + new_tokens
    if context is not None and length > context:
        raise OptionError(
            f"tokens {new_tokens}: with the prompt's they are {length}, the model's context has {context}"
        )
    model = load_model(directory, torch.float32 if device.type == "cpu" else "auto", trust_remote_code)
    model.to(device).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=pad)
    text: str = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return text

"""Perplexity, block by block: a model larger than memory is evaluated from disk.

The text is joined by blank lines and tokenised once; windows do not overlap; each window of T tokens gives
T - 1 predictions; the perplexity is the exponential of their mean negative log likelihood.
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import Any

from torch.nn.functional import cross_entropy

from ..errors import NumericsError
from ..progress import Progress
from .fidelity import Fidelity, Reading


def perplexity(
    reading: Reading, progress: Progress, *, dense: Reading | None = None, keep: bool = False, first: int = 0
) -> dict[str, Any]:
    """Measure a model's perplexity on windows of text.

    Args:
        reading: the model and the windows.
        progress: hears of every micro-batch.
        dense: of the model that this one was made from, measured with `keep`: tells the distance from it too.
        keep: whether others are to be compared with this model.
        first: the block to begin with, whose input is in the reading.

    Returns:
        text, seqlen, windows, tokens (in the windows), available_tokens (in the text), loss (nats per prediction)
        and perplexity; with `dense` also fidelity (`Fidelity.result`).

    Raises:
        NumericsError: the model's output is not finite.
        DataError: the dense model has other tokens.
    """
    stream, tokens = reading.stream, reading.tokens
    fidelity = Fidelity(dense, tokens) if dense else None
    count = len(reading.host.skeleton.real)
    progress.start(f"perplexity on {tokens.source}", (count - first + 1) * len(stream.batches))
    for index in range(first, count):
        with reading.host.block(index) as block:
            stream.forward(index, block, progress)
        if keep:
            reading.keep(index)
        if fidelity:  # with another number of blocks, none stands for another
            alike = count == len(fidelity.dense.host.skeleton.real)
            fidelity.add_block(index, stream.get(index + 1, 0) if alike else None)
    loss, predictions = 0.0, 0
    for number, ids_BT in enumerate(stream.batches):
        theirs = fidelity.dense.logits(number) if fidelity else repeat(None, len(ids_BT))
        for ids_T, logits_TV, dense_TV in zip(ids_BT, reading.logits(number), theirs, strict=True):
            next_T = ids_T[1:].to(logits_TV.device)
            loss += float(cross_entropy(logits_TV, next_T, reduction="sum"))
            predictions += len(logits_TV)
            if fidelity and dense_TV is not None:
                fidelity.add(dense_TV, logits_TV, next_T)
        progress.advance()
    progress.finish()
    if not math.isfinite(loss):
        raise NumericsError("the model's predictions hold NaN or Inf; its weights are damaged")
    mean = loss / predictions
    return {
        "text": tokens.source,
        "seqlen": tokens.seqlen,
        "windows": len(tokens.rows),
        "tokens": tokens.tokens,
        "available_tokens": tokens.available,
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else None,
        **({"fidelity": fidelity.result()} if fidelity else {}),
    }

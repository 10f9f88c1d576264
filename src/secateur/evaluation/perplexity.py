"""Perplexity, block by block: a model larger than memory is evaluated from disk.

The text is joined by blank lines and tokenised once; windows do not overlap; each window of T tokens gives
T - 1 predictions; the perplexity is the exponential of their mean negative log likelihood.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch.nn.functional import cross_entropy

from ..errors import NumericsError
from ..models.hosts import Host
from ..pipeline.calibration import Tokens
from ..pipeline.stream import Stream
from ..progress import Progress


def perplexity(host: Host, tokens: Tokens, folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure a model's perplexity on windows of tokens.

    Args:
        host: the model, from disk or in memory.
        tokens: the windows.
        folder: where hidden states may lie meanwhile.
        progress: hears of every micro-batch.

    Returns:
        text, seqlen, windows, tokens (in the windows), available_tokens (in the text), loss (nats per
        prediction) and perplexity.

    Raises:
        NumericsError: the model's output is not finite.
    """
    stream = Stream(host, tokens.rows, folder)
    count = len(host.skeleton.real)
    progress.start(f"perplexity on {tokens.source}", (count + 1) * len(stream.batches))
    for index in range(count):
        with host.block(index) as block:
            stream.forward(index, block, progress)
    loss, predictions = 0.0, 0
    for number, ids_BT in enumerate(stream.batches):
        hidden_BTD = stream.get(count, number)
        for row, hidden in zip(ids_BT, hidden_BTD, strict=True):
            logits_TV = host.skeleton.logits(row[None].to(host.device), hidden[None])[0, :-1].float()
            loss += float(cross_entropy(logits_TV, row[1:].to(host.device), reduction="sum"))
            predictions += len(row) - 1
        progress.advance()
    progress.finish()
    stream.close()
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
    }

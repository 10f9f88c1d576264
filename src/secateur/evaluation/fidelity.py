"""How far a model is from the dense model that it was made from, on the same windows of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import log_softmax

from ..errors import DataError
from ..models.hosts import Host
from ..pipeline.calibration import Tokens
from ..pipeline.stream import Stream
from ..pruning.divergence import divergence


class Reading:
    """A model that reads windows of text, block by block; what it makes of them lies on disk.

    Hidden states after the last block are there for all windows; after every other block, for the first micro-batch
    where they were kept.
    """

    def __init__(self, host: Host, tokens: Tokens, folder: Path) -> None:
        self.host, self.tokens, self.folder = host, tokens, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.stream = Stream(host, tokens.rows, folder)

    def keep(self, index: int) -> None:
        """Keep what block `index` made of the first micro-batch; it was run last."""
        save_file({"hidden": self.stream.get(index + 1, 0).cpu().contiguous()}, self._kept(index))

    def kept(self, index: int) -> Tensor | None:
        """Read what block `index` made of the first micro-batch, [B, T, D]; None if that was not kept."""
        path = self._kept(index)
        return load_file(path)["hidden"] if path.exists() else None

    def logits(self, number: int) -> Iterator[Tensor]:
        """Yield the predictions [T - 1, V] for each window of a micro-batch, after the last block was run."""
        skeleton = self.host.skeleton
        hidden_BTD = self.stream.get(len(skeleton.real), number)
        for ids_T, hidden_TD in zip(self.stream.batches[number].to(self.host.device), hidden_BTD, strict=True):
            yield skeleton.logits(ids_T[None], hidden_TD[None])[0, :-1].float()

    def close(self) -> None:
        """Remove everything."""
        self.stream.close()
        for index in range(len(self.host.skeleton.real)):
            self._kept(index).unlink(missing_ok=True)

    def _kept(self, index: int) -> Path:
        return self.folder / f"after-{index:04d}.safetensors"


def check_same_tokens(dense: Tokens, tokens: Tokens) -> None:
    """Raise DataError if the dense model and another read a text as different tokens."""
    if dense.digest == tokens.digest:
        return
    why = "are they of one family, with one tokenizer?"
    short, long = sorted((dense.seqlen, tokens.seqlen))
    if short < long:  # their contexts differ
        why = f"their windows have {short} and {long} tokens; give --seqlen {short}"
    raise DataError(
        f"{tokens.source}: the two models read it as different tokens, so their predictions cannot be compared; {why}"
    )


class Fidelity:
    """Sums over predictions, and a distance for each block."""

    def __init__(self, dense: Reading, tokens: Tokens) -> None:
        """Compare with `dense`, which has read its windows and kept what its blocks made of them.

        Raises:
            DataError: the dense model reads the text as other tokens.
        """
        check_same_tokens(dense.tokens, tokens)
        self.dense = dense
        self.divergence = 0.0
        self.same = self.predictions = 0
        self.increases: list[float] = []
        self.blocks: list[float | None] = []

    def add_block(self, index: int, hidden_BTD: Tensor | None) -> None:
        """Note how far the first micro-batch is from the dense model's after block `index`; None: not comparable."""
        dense_BTD = self.dense.kept(index)
        if hidden_BTD is None or dense_BTD is None or dense_BTD.shape != hidden_BTD.shape:
            self.blocks.append(None)
            return
        dense_BTD = dense_BTD.to(hidden_BTD.device).float()
        norm = float(torch.linalg.vector_norm(dense_BTD))
        distance = float(torch.linalg.vector_norm(hidden_BTD.float() - dense_BTD))
        self.blocks.append(distance / norm if norm else None)

    def add(self, dense_TV: Tensor, logits_TV: Tensor, next_T: Tensor) -> None:
        """Add the predictions of one window, whose true tokens are `next_T`.

        Raises:
            DataError: the vocabularies differ.
        """
        if dense_TV.shape != logits_TV.shape:
            raise DataError(f"the models' vocabularies differ: {logits_TV.shape[-1]} and {dense_TV.shape[-1]} tokens")
        self.same += int((dense_TV.argmax(-1) == logits_TV.argmax(-1)).sum())
        self.predictions += len(logits_TV)
        dense_TV, logits_TV = log_softmax(dense_TV, dim=-1), log_softmax(logits_TV, dim=-1)
        self.divergence += float(divergence(dense_TV, logits_TV).sum())
        gap_T1 = dense_TV.gather(-1, next_T[:, None]) - logits_TV.gather(-1, next_T[:, None])
        self.increases.append(float(gap_T1.mean(dtype=torch.float64)))

    def result(self) -> dict[str, Any]:
        """Put together the distances.

        Returns:
            kl: mean KL(dense || model) in nats per prediction.
            top1: share of predictions whose likeliest token is the dense model's.
            loss_increase_stderr: standard error of the mean increase of the loss, window by window.
            blocks: relative distance of the hidden states after each block.
        """
        mean, windows = self.divergence / self.predictions, len(self.increases)
        return {
            "kl": mean if math.isfinite(mean) else None,
            "top1": self.same / self.predictions,
            "loss_increase_stderr": statistics.stdev(self.increases) / windows**0.5 if windows > 1 else None,
            "blocks": self.blocks,
        }

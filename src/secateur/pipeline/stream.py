"""Calibration tokens on their way through the blocks.

Hidden states lie in two files, that of even and that of odd blocks: a block reads one and writes the other,
so a run that dies in the middle of a block still has the block's input.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import OutputError, unwritable
from ..models.anatomy import BlockCall
from ..models.hosts import Host
from ..models.replay import check_replay
from ..progress import Progress

MICRO_BATCH_TOKENS = 4096
CHECK_TOKENS = 64


class Stream:
    """Rows of tokens on their way through a model: micro-batches, their calls, and their hidden states."""

    def __init__(
        self, host: Host, rows: Sequence[Tensor], folder: Path, first: int = 0, batch_tokens: int | None = None
    ) -> None:
        """Run the skeleton on all rows.

        Args:
            host: the model.
            rows: token ids, each [T]; consecutive rows of one length share micro-batches.
            folder: where hidden states are kept.
            first: the block to go on with; its input must be in the folder unless it is 0.
            batch_tokens: of a micro-batch, at most, if it is more than one row; None is `MICRO_BATCH_TOKENS`.

        Raises:
            ModelError: the model's blocks cannot be run one at a time.
        """
        self.host = host
        self.batches = list(micro_batches(rows, batch_tokens))
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [folder / "even.bin", folder / "odd.bin"]
        self.observable = check_replay(host.skeleton, host.block, self.batches[0][:1, :CHECK_TOKENS].to(host.device))
        self.calls: list[list[BlockCall]] = []
        self._offsets = [0]
        for number, ids in enumerate(self.batches):
            hidden, calls = host.skeleton.record(ids.to(host.device))
            if self.calls:
                calls = [call.shared_with(known) for call, known in zip(calls, self.calls[-1], strict=True)]
            self.calls.append(calls)
            self.hidden_shape, self._dtype = hidden.shape[2:], hidden.dtype
            self._offsets.append(self._offsets[-1] + hidden.numel())
            if first == 0:
                self.put(0, number, hidden)

    def beside(self, folder: Path) -> Stream:
        """Return a stream of the same rows, at the first block as this one still is, with hidden states of its own."""
        other = copy.copy(self)
        folder.mkdir(parents=True, exist_ok=True)
        other._files = [folder / file.name for file in self._files]
        try:
            shutil.copyfile(self._files[0], other._files[0])
        except OSError as error:
            raise OutputError(f"{folder}: hidden states {unwritable(error)}") from error
        return other

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(ids.numel() for ids in self.batches)

    def get(self, index: int, number: int) -> Tensor:
        """Read the input of block `index` for one micro-batch, [B, T, D]."""
        dtype = self._dtype_of(index)
        # torch's memory, aligned to 64 bytes: the last bits of a product depend on where its operands lie.
        hidden = torch.empty((*self.batches[number].shape, *self.hidden_shape), dtype=dtype, device="cpu")
        with self._files[index % 2].open("rb") as file:
            file.seek(self._offsets[number] * dtype.itemsize)
            file.readinto(hidden.view(-1).view(torch.uint8).numpy().data)
        return hidden.to(self.host.device)

    def put(self, index: int, number: int, hidden_BTD: Tensor) -> None:
        """Write the input of block `index` for one micro-batch."""
        dtype = self._dtype_of(index)
        data = hidden_BTD.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            with self._files[index % 2].open("r+b" if self._files[index % 2].exists() else "w+b") as file:
                file.seek(self._offsets[number] * dtype.itemsize)
                file.write(data)
        except OSError as error:
            raise OutputError(f"{self._files[index % 2]}: hidden states {unwritable(error)}") from error

    def _dtype_of(self, index: int) -> torch.dtype:
        """The dtype of a block's input: among 16-bit weights, some models keep hidden states in float32 (Mamba)."""
        return self.host.skeleton.dtypes[index - 1] if index else self._dtype

    def run(self, index: int, block: nn.Module, number: int) -> Tensor:
        """Return the output of one resident block for one micro-batch, [B, T, D]."""
        return self.calls[number][index].run(block, self.get(index, number))

    def forward(self, index: int, block: nn.Module, progress: Progress, compare: bool = False) -> float | None:
        """Run one block on all tokens: its input becomes the next block's.

        Args:
            index: of the block.
            block: resident.
            progress: hears of every micro-batch.
            compare: what lies in the next block's place is the dense output; measure the distance from it.

        Returns:
            The relative output error |dense - new| / |dense| over all tokens (Frobenius norms), or None.
        """
        distance = norm = 0.0
        with torch.no_grad():
            for number in range(len(self.batches)):
                out = self.run(index, block, number)
                if compare:
                    dense = self.get(index + 1, number).to(out.device).float()  # in float16 the norm overflows
                    norm += float(torch.linalg.vector_norm(dense)) ** 2
                    distance += float(torch.linalg.vector_norm(dense.sub_(out))) ** 2
                self.put(index + 1, number, out)
                progress.advance()
        return (distance / norm) ** 0.5 if compare and norm else None

    def close(self) -> None:
        """Remove the hidden states."""
        for file in self._files:
            file.unlink(missing_ok=True)


def micro_batches(rows: Sequence[Tensor], tokens: int | None = None) -> Iterator[Tensor]:
    """Stack consecutive rows of one length into batches [B, T] of at most `tokens` tokens, or of one row."""
    start = 0
    while start < len(rows):
        length = len(rows[start])
        most = max(1, (tokens or MICRO_BATCH_TOKENS) // length)
        end = start + 1
        while end < len(rows) and end - start < most and len(rows[end]) == length:
            end += 1
        yield torch.stack(list(rows[start:end]))
        start = end

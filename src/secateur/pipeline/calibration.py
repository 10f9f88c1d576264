"""Texts -> rows of tokens: random crops for calibration, non-overlapping windows for evaluation."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, OptionError
from .chats import Chat, as_texts
from .given import MOST_ITEMS, encode, need, read_data
from .records import IGNORED, Corpus
from .sources import read_source

log = logging.getLogger("secateur")

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 2048
TRAINING_SEQLEN = 512  # by default: a step on a CPU is to take seconds
FEW_TOKENS = 8192
USUAL_WINDOWS = 40  # of an evaluation that is made by the way: it costs seconds and not hours
STRINGS = "the given strings"  # in place of a source's name
CHARACTERS_PER_TOKEN = 8  # generous, for sources that are read only as far as needed


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, each a LongTensor [T] of its own length, and where they come from.

    Attributes:
        rows: the rows.
        source: name and split of the text.
        available: tokens that the whole source has, of which the rows are a part.
        labels: for each row what is learnt of it in training, -100 where nothing is; None if all of it is.
    """

    rows: list[Tensor]
    source: str
    available: int
    labels: list[Tensor] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row) for row in self.rows)

    @property
    def seqlen(self) -> int:
        """Length of the longest row."""
        return max(len(row) for row in self.rows)

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, and of their labels if they have any."""
        sha = hashlib.sha256()
        for row in [*self.rows, *(self.labels or [])]:
            sha.update(len(row).to_bytes(8, "little") + row.numpy().tobytes())
        return sha.hexdigest()


def context_length(config: Any) -> int | None:
    """The longest sequence that the model's config admits; None if it names none."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return None


def choose_seqlen(seqlen: int | None, config: Any) -> int:
    """Return `seqlen`, or min(2048, context).

    Raises:
        OptionError: it is longer than the model's context, or too short to predict anything.
    """
    context = context_length(config)
    if seqlen is None:
        return min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    if seqlen < 2:
        raise OptionError(f"seqlen {seqlen}: a sequence has at least 2 tokens")
    if context is not None and seqlen > context:
        raise OptionError(f"seqlen {seqlen} is longer than the model's context of {context} tokens")
    return seqlen


def check_draw(samples: int | None, seed: int) -> None:
    """Raise OptionError for a number of rows, or a seed, that cannot be."""
    if samples is not None and samples < 1:
        raise OptionError(f"samples {samples}: at least 1 is needed")
    if not -(2**63) <= seed < 2**64:
        raise OptionError(f"seed {seed}: is no 64-bit number")


def calibration_tokens(
    calibration: Any, tokenizer: Any, config: Any, samples: int | None, seqlen: int | None, seed: int
) -> Tokens:
    """Return the calibration rows for a source's name or for texts, rows or a batch given in Python.

    Args:
        calibration: a SOURCE (a name or a path); integer ids [samples, seqlen]; strings, each a sequence of its own
            length; records {"text"}, {"messages"}, {"input_ids"} as a list, a loader, a `datasets.Dataset` or a
            table; a tokenizer's batch, whose padded positions are left out; or `Tokens`, which are what this
            function returned before.
        tokenizer: needed unless the rows are token ids.
        config: the model's config, for context and vocabulary.
        samples: how many rows; None takes 128, or as many as there are.
        seqlen: tokens of a crop; None takes min(2048, context).
        seed: of the crops' random starts.

    Raises:
        DataError: no usable text, or too little of it.
        OptionError: `samples` or `seqlen` cannot be met.
    """
    check_draw(samples, seed)
    if isinstance(calibration, Tokens):
        return calibration
    wanted = samples or DEFAULT_SAMPLES
    length = choose_seqlen(seqlen, config)
    corpus = read_data(calibration, "calibration", wanted * length * CHARACTERS_PER_TOKEN, max(wanted, MOST_ITEMS))
    if corpus.rows is None and not corpus.apart:
        return _crops(corpus, tokenizer, wanted, samples is not None, length, seed)
    if corpus.rows is None:
        name, rows = STRINGS, _apart(corpus.texts or [], tokenizer, seqlen or context_length(config))
    else:
        name, rows = corpus.name, _as_tensors(corpus.rows, corpus.name)
    if not rows:
        raise DataError(f"{name}: holds no tokens")
    available = sum(len(row) for row in rows)
    if len(rows) < wanted:
        _few(name, len(rows), wanted, samples is not None, "sequences")
    tokens = Tokens(rows[:wanted], name, available)
    _check_rows(tokens, config)
    if tokens.tokens < FEW_TOKENS:
        log.warning(
            "calibration: %d tokens in %d sequences are enough to try, too few to trust",
            tokens.tokens,
            len(tokens.rows),
        )
    return tokens


def evaluation_windows(
    source: str | os.PathLike[str], tokenizer: Any, config: Any, seqlen: int | None, windows: int | None
) -> Tokens:
    """Return the first `windows` (None: all) non-overlapping windows of `seqlen` tokens of a source.

    Raises:
        DataError: the text is shorter than one window.
        OptionError: an option cannot be met.
    """
    if windows is not None and windows < 1:
        raise OptionError(f"windows {windows}: at least 1 is needed")
    corpus = read_source(os.fsdecode(source), "test")
    if corpus.rows is not None:
        found = _predictable(corpus)
        if windows is not None and windows > len(found.rows):
            raise OptionError(f"windows {windows}: {corpus.name} has {len(found.rows)} rows")
        tokens = Tokens(found.rows[:windows], found.source, found.available)
        _check_rows(tokens, config)
        return tokens
    length = choose_seqlen(seqlen, config)
    found = _windows(corpus, tokenizer, length)
    if windows is not None and windows > len(found.rows):
        raise OptionError(f"windows {windows}: {corpus.name} has {len(found.rows)} windows of {length} tokens")
    return Tokens(found.rows[:windows], found.source, found.available)


def training_rows(data: Any, tokenizer: Any, config: Any, seqlen: int | None, wanted: int) -> Tokens:
    """Return up to `wanted` rows to train on: non-overlapping windows of a text, or rows of token ids as they are.

    Args:
        data: as `calibration_tokens` takes it.
        tokenizer: needed unless the rows are token ids.
        config: the model's config.
        seqlen: tokens of a window; None takes min(512, context).
        wanted: how many rows are of use.

    Raises:
        DataError: no usable text, or less than one window of it.
        OptionError: `seqlen` cannot be met.
    """
    length = choose_seqlen(
        min(TRAINING_SEQLEN, context_length(config) or TRAINING_SEQLEN) if seqlen is None else seqlen, config
    )
    corpus = read_data(data, "data", wanted * length * CHARACTERS_PER_TOKEN, None, labels=True)
    if corpus.rows is None:
        found = _windows(corpus, tokenizer, length)
        return Tokens(found.rows[:wanted], found.source, found.available)
    found = _predictable(corpus)
    tokens = Tokens(found.rows[:wanted], found.source, found.available, found.labels and found.labels[:wanted])
    _check_rows(tokens, config)
    return tokens


def _predictable(corpus: Corpus) -> Tokens:
    """The rows of token ids in which there is something to predict; how many others there are is told."""
    rows = _as_tensors(corpus.rows or [], corpus.name)
    labels = None if corpus.labels is None else _as_tensors(corpus.labels, corpus.name)
    kept = [bool((row[1:] != IGNORED).any()) for row in labels or rows]
    if not all(kept):
        none = kept.count(False)
        log.warning("%s: %d of %d rows hold no token to predict and are skipped", corpus.name, none, len(kept))
    rows = list(compress(rows, kept))
    return Tokens(rows, corpus.name, sum(map(len, rows)), labels and list(compress(labels, kept)))


def _apart(texts: Sequence[str | Chat], tokenizer: Any, longest: int | None) -> list[Tensor]:
    """Each text as a row of its own, cut at `longest`; how many have no tokens is told."""
    tokenizer = need(tokenizer, STRINGS)
    texts = as_texts(texts, tokenizer, STRINGS)
    rows = [torch.tensor(encode(tokenizer, text, STRINGS), dtype=torch.long)[:longest] for text in texts]
    found = [row for row in rows if len(row)]
    if 0 < len(found) < len(rows):
        log.warning("%s: %d of %d have no tokens and are skipped", STRINGS, len(rows) - len(found), len(rows))
    return found


def _windows(corpus: Corpus, tokenizer: Any, length: int) -> Tokens:
    """All non-overlapping windows of a text; what is left over at its end is dropped."""
    ids = _tokenise(corpus, tokenizer)
    count = len(ids) // length
    if count < 1:
        raise DataError(
            f"{corpus.name}: {len(ids)} tokens are less than one window of {length}; use a shorter --seqlen"
        )
    return Tokens(list(ids[: count * length].view(count, length)), corpus.name, len(ids))


def usual_windows(source: str | os.PathLike[str], tokenizer: Any, config: Any, seqlen: int | None) -> Tokens:
    """Return the first 40 windows of a source, or as many as there are; raises as `evaluation_windows`."""
    tokens = evaluation_windows(source, tokenizer, config, seqlen, None)
    return Tokens(tokens.rows[:USUAL_WINDOWS], tokens.source, tokens.available)


def _as_tensors(rows: Sequence[Sequence[int]], name: str) -> list[Tensor]:
    try:
        return [torch.tensor(row, dtype=torch.long) for row in rows]
    except (OverflowError, RuntimeError, ValueError):
        raise DataError(f"{name}: a token id is no 64-bit number") from None


def _crops(corpus: Corpus, tokenizer: Any, wanted: int, explicit: bool, length: int, seed: int) -> Tokens:
    ids = _tokenise(corpus, tokenizer)
    available = len(ids) // length
    if available < 1:
        raise DataError(
            f"{corpus.name}: {len(ids)} tokens are less than one sequence of {length}; use more text or a "
            "shorter --seqlen"
        )
    if available < wanted:
        _few(corpus.name, available, wanted, explicit, f"sequences of {length} tokens")
        wanted = available
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (wanted,), generator=generator)
    return Tokens([ids[start : start + length].clone() for start in starts.tolist()], corpus.name, len(ids))


def _few(name: str, available: int, wanted: int, explicit: bool, what: str) -> None:
    if explicit:
        raise OptionError(f"samples {wanted}: {name} has {available} {what}")
    log.info("calibration: %s has %d %s, fewer than the usual %d", name, available, what, wanted)


def _check_rows(tokens: Tokens, config: Any) -> None:
    if not tokens.rows:
        raise DataError(f"{tokens.source}: holds no rows of at least 2 tokens")
    context, vocabulary = context_length(config), config.get_text_config().vocab_size
    for number, row in enumerate(tokens.rows, 1):
        if context is not None and len(row) > context:
            raise DataError(f"{tokens.source}: row {number} has {len(row)} tokens, the model's context has {context}")
        if int(row.max()) >= vocabulary or int(row.min()) < 0:
            raise DataError(
                f"{tokens.source}: row {number} has a token id outside the model's vocabulary of {vocabulary}; "
                "was it made by another tokenizer?"
            )
    for number, row in enumerate(tokens.labels or [], 1):
        if bool(((row != IGNORED) & ((row < 0) | (row >= vocabulary))).any()):
            raise DataError(
                f"{tokens.source}: row {number} has a label that is neither {IGNORED} nor a token id of the model's "
                f"vocabulary of {vocabulary}"
            )


def _tokenise(corpus: Corpus, tokenizer: Any) -> Tensor:
    """Join all texts by blank lines and tokenise them once."""
    tokenizer = need(tokenizer, corpus.name)
    texts = as_texts(corpus.texts or [], tokenizer, corpus.name)
    chats = all(isinstance(text, Chat) for text in corpus.texts or [])
    ids = encode(tokenizer, "\n\n".join(texts), corpus.name, special=not chats)
    return torch.tensor(ids, dtype=torch.long)

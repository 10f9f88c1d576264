"""Texts -> rows of tokens: random crops for calibration, non-overlapping windows for evaluation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, OptionError
from .given import encode, given_rows, need
from .sources import Corpus, from_records, read_source

log = logging.getLogger("secateur")

DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 2048
TRAINING_SEQLEN = 512  # by default: a step on a CPU is to take seconds
FEW_TOKENS = 8192
USUAL_WINDOWS = 40  # of an evaluation that is made by the way: it costs seconds and not hours
CHARACTERS_PER_TOKEN = 8  # generous, for sources that are read only as far as needed


@dataclass(frozen=True)
class Tokens:
    """Rows of token ids, each a LongTensor [T] of its own length, and where they come from.

    Attributes:
        rows: the rows.
        source: name and split of the text.
        available: tokens that the whole source has, of which the rows are a part.
    """

    rows: list[Tensor]
    source: str
    available: int

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
        """SHA-256 of the rows."""
        sha = hashlib.sha256()
        for row in self.rows:
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
        calibration: a SOURCE (str); a LongTensor [samples, seqlen]; an iterable of strings, each a sequence of
            its own length; a `datasets.Dataset` or records {"text"}, {"messages"}, {"input_ids"}; a tokenizer's
            batch, whose padded positions are left out; or `Tokens`, which are what this function returned before.
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
    calibration = str(calibration) if isinstance(calibration, Path) else calibration
    wanted = samples or DEFAULT_SAMPLES
    length = choose_seqlen(seqlen, config)
    given = given_rows(calibration, tokenizer, seqlen or context_length(config), "calibration")
    if given is None:
        if isinstance(calibration, str):
            corpus = read_source(calibration, "train", characters=wanted * length * CHARACTERS_PER_TOKEN)
        else:
            corpus = from_records(calibration, "the given records")
        if corpus.rows is None:
            return _crops(corpus, tokenizer, wanted, samples is not None, length, seed)
        given = corpus.name, _as_tensors(corpus)
    name, rows = given
    rows = [row for row in rows if len(row)]
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


def evaluation_windows(source: str, tokenizer: Any, config: Any, seqlen: int | None, windows: int | None) -> Tokens:
    """Return the first `windows` (None: all) non-overlapping windows of `seqlen` tokens of a source.

    Raises:
        DataError: the text is shorter than one window.
        OptionError: an option cannot be met.
    """
    if windows is not None and windows < 1:
        raise OptionError(f"windows {windows}: at least 1 is needed")
    corpus = read_source(source, "test", characters=None)
    if corpus.rows is not None:
        rows = [row for row in _as_tensors(corpus) if len(row) > 1]
        if windows is not None and windows > len(rows):
            raise OptionError(f"windows {windows}: {corpus.name} has {len(rows)} rows")
        tokens = Tokens(rows[:windows], corpus.name, sum(map(len, rows)))
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
    data = str(data) if isinstance(data, Path) else data
    if (
        isinstance(data, Iterable)
        and not isinstance(data, (str, Tensor, Mapping))
        and not hasattr(data, "column_names")
    ):
        data = list(data)
        if data and all(isinstance(text, str) for text in data):
            data = [{"text": text} for text in data]  # to be joined and cut
    given = given_rows(data, tokenizer, length, "data")
    if given is None:
        if isinstance(data, str):
            corpus = read_source(data, "train", characters=wanted * length * CHARACTERS_PER_TOKEN)
        else:
            corpus = from_records(data, "the given records")
        if corpus.rows is None:
            found = _windows(corpus, tokenizer, length)
            return Tokens(found.rows[:wanted], found.source, found.available)
        given = corpus.name, _as_tensors(corpus)
    name, rows = given
    rows = [row for row in rows if len(row) > 1]
    tokens = Tokens(rows[:wanted], name, sum(map(len, rows)))
    _check_rows(tokens, config)
    return tokens


def _windows(corpus: Corpus, tokenizer: Any, length: int) -> Tokens:
    """All non-overlapping windows of a text; what is left over at its end is dropped."""
    ids = _tokenise(corpus, tokenizer)
    count = len(ids) // length
    if count < 1:
        raise DataError(
            f"{corpus.name}: {len(ids)} tokens are less than one window of {length}; use a shorter --seqlen"
        )
    return Tokens(list(ids[: count * length].view(count, length)), corpus.name, len(ids))


def usual_windows(source: str, tokenizer: Any, config: Any, seqlen: int | None) -> Tokens:
    """Return the first 40 windows of a source, or as many as there are; raises as `evaluation_windows`."""
    tokens = evaluation_windows(source, tokenizer, config, seqlen, None)
    return Tokens(tokens.rows[:USUAL_WINDOWS], tokens.source, tokens.available)


def _as_tensors(corpus: Corpus) -> list[Tensor]:
    try:
        return [torch.tensor(row, dtype=torch.long) for row in corpus.rows or []]
    except (OverflowError, RuntimeError, ValueError):
        raise DataError(f"{corpus.name}: a token id is no 64-bit number") from None


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


def _tokenise(corpus: Corpus, tokenizer: Any) -> Tensor:
    """Join all texts by blank lines and tokenise them once."""
    tokenizer = need(tokenizer, corpus.name)
    texts = corpus.texts or []
    chats = [not isinstance(text, str) for text in texts]
    if any(chats):
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{corpus.name}: has chats, and the model's tokenizer has no chat template")
        try:
            texts = [t if isinstance(t, str) else tokenizer.apply_chat_template(t, tokenize=False) for t in texts]
        except Exception as error:  # whatever the template raises
            what = " ".join(str(error).split())[:120]
            raise DataError(f"{corpus.name}: a chat does not fit the tokenizer's template ({what})") from None
    ids = encode(tokenizer, "\n\n".join(texts), corpus.name, special=not all(chats))
    return torch.tensor(ids, dtype=torch.long)

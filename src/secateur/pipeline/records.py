"""Records as files, the hub and Python code hold them -> texts, chats or rows of token ids.

A field that is null is a field that is not there. What is read in another way than its name says, and what is left
out, is told in one line.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from ..errors import DataError, nearest
from .chats import OPTIONS, Chat, as_chat, conversation

log = logging.getLogger("secateur")

IGNORED = -100  # label of what is not learnt
FIELDS = ("input_ids", "messages", "text")  # the first that is there is read
USUAL = ("conversations", "conversation", "content")  # read where they are the only one of their kind
PROMPTS = ("prompt", "instruction", "question", "query")
ANSWERS = ("completion", "response", "output", "answer")
COLUMNS = (*FIELDS, *USUAL, *PROMPTS, *ANSWERS)
MASK, LABELS = "attention_mask", "labels"
LEARNT = ("completion_mask", "assistant_masks")  # 0 where a token is not learnt
MOST_UNREAD = 2048  # rows of a stream, after which a column that is nowhere is no longer sought
RENAME = "call one of them text"

Row = tuple[list[int], "list[int] | None"]  # ids, and their labels if it has any


@dataclass(frozen=True)
class Corpus:
    """What a source holds: texts to be joined and cut, or rows of token ids to be used as they are.

    Attributes:
        name: the source and its split, as evidence names it.
        texts: texts or chats, if the source has them.
        rows: rows of token ids, if the source is tokenised already.
        labels: for each row what is learnt of it, `IGNORED` where nothing is; None if all of it is.
        apart: each text is a sequence of its own, where there is use for one.
    """

    name: str
    texts: Sequence[str | Chat] | None = None
    rows: list[list[int]] | None = None
    labels: list[list[int]] | None = None
    apart: bool = False


@dataclass
class _Seen:
    """What was read of the records so far."""

    texts: list[str | Chat] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    used: dict[str, None] = field(default_factory=dict)
    left: dict[str, None] = field(default_factory=dict)
    count: int = 0
    empty: int = 0
    characters: int = 0
    unclear: tuple[int, Mapping[str, Any]] | None = None  # the first row with columns of which none is known

    def take(self, value: str | Chat | list[Row]) -> bool:
        """Keep what a row holds; whether it holds anything."""
        if isinstance(value, list):
            rows = [row for row in value if row[0]]
            self.rows += rows
            return bool(rows)
        self.texts.append(value)
        self.characters += len(value) if isinstance(value, str) else 0
        return True


def from_records(
    records: Iterable[Any],
    name: str,
    column: str | None = None,
    *,
    labels: bool = False,
    characters: int | None = None,
    choose: str = RENAME,
) -> Corpus:
    """Sort records into a corpus: {"text"}, {"messages"}, {"input_ids"}, or what has one obvious meaning.

    Args:
        records: mappings; a string counts as a text, a list as token ids or as a chat.
        name: of the source, for messages.
        column: the one to read; None finds it.
        labels: whether what is learnt is to be told from what is not; else those columns are left out.
        characters: about how many of text are wanted of a source too large to be read whole.
        choose: how a column is chosen, for messages.

    Raises:
        DataError: a record is damaged, no column can be read, or there are no records.
    """
    seen = _Seen()
    for number, item in enumerate(records, 1):
        seen.count = number
        record = _as_record(item)
        if record is None:
            what = described(item)
            raise DataError(f"{name}: row {number} is {what}, and no object with text, messages or input_ids")
        _read(seen, record, column, f"{name}: row {number}", labels=labels)
        if characters is not None and (
            seen.characters >= characters or (seen.empty == number and number >= MOST_UNREAD)
        ):
            break
    _check(seen, name, column, choose)
    if seen.empty:
        log.warning("%s: %d of %d rows hold no text and are skipped", name, seen.empty, seen.count)
    if column is None and (seen.left or not seen.used.keys() <= set(FIELDS)):
        left = f"; leaves out {', '.join(seen.left)}"[:400] if seen.left else ""
        log.info("%s: reads %s%s", name, ", ".join(seen.used), left)
    learnt = None
    if any(label is not None for _, label in seen.rows):
        learnt = [ids if label is None else label for ids, label in seen.rows]
    return Corpus(name, seen.texts or None, [ids for ids, _ in seen.rows] or None, learnt)


def _check(seen: _Seen, name: str, column: str | None, choose: str) -> None:
    """Refuse records that make no corpus."""
    if seen.texts and seen.rows:
        raise DataError(f"{name}: some rows are tokenised and some are not; split the file, or {choose}")
    if not seen.count:
        raise DataError(f"{name}: holds no rows")
    if seen.unclear and seen.empty == seen.count:
        number, record = seen.unclear
        if column is not None:
            raise DataError(f"{name}: row {number} has no column {column!r}; {nearest(column, map(shown, record))}")
        if "role" in record and "content" in record:
            raise DataError(f"{name}: row {number} is one message of a chat; put the chat in one row, as messages")
        there = ", ".join(map(shown, record))[:200]
        raise DataError(
            f"{name}: row {number} has none of the fields text, messages, input_ids; it has {there}: {choose}"
        )
    if not seen.rows and not any(not isinstance(text, str) or text.strip() for text in seen.texts):
        raise DataError(f"{name}: holds no text: its {seen.count} rows are empty")


def _as_record(item: Any) -> Mapping[str, Any] | None:
    """A row as a mapping: what is none has one field, by what it is; null has none."""
    if isinstance(item, Mapping):
        return item
    if item is None:
        return {}
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, Sequence) and all(isinstance(part, Mapping) for part in item):
        return {"messages": item}
    return {"input_ids": item} if isinstance(item, Sequence) else None


def absent(value: Any) -> bool:
    """Whether a field is as good as not there: null, not a number, or a list of nothing."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if hasattr(value, "shape"):
        return 0 in value.shape
    return not isinstance(value, str) and hasattr(value, "__len__") and len(value) == 0


def _read(seen: _Seen, record: Mapping[str, Any], column: str | None, where: str, *, labels: bool) -> None:
    """Read one record."""
    there = {key: value for key, value in record.items() if not absent(value)}
    used, value = _found(there, record, column)
    if not used:
        null = any(
            key in record and key not in there for key in ((column,) if column is not None else (*FIELDS, *USUAL))
        )
        if there and not null and seen.unclear is None:
            seen.unclear = seen.count, record
        seen.empty += 1
        return
    what: str | Chat | list[Row]
    companions: tuple[str, ...] = ()
    if isinstance(value, str):
        what = value
    elif (messages := as_chat(value, where)) is not None:
        options = {key: there[key] for key in OPTIONS if key in there}
        what, companions = Chat(messages, options), tuple(options)
    elif column is None and used[0] in ("messages", "text"):
        raise DataError(f"{where}: neither a text nor a list of messages")
    else:
        what = _id_rows(used[0], value, there, where, labels=labels)
        companions = (MASK, LABELS, *LEARNT) if labels else (MASK,)
    seen.used |= dict.fromkeys(map(shown, used))
    seen.left |= dict.fromkeys(shown(key) for key in there if key not in (*used, *companions))
    seen.empty += not seen.take(what)


def _found(there: Mapping[str, Any], record: Mapping[str, Any], column: str | None) -> tuple[tuple[str, ...], Any]:
    """The columns that are to be read, and what they hold together; no columns if nothing can be read."""
    if column is not None:
        return ((column,), there[column]) if column in there else ((), None)
    for name in FIELDS:
        if name in there:
            return (name,), there[name]
    ways: list[tuple[tuple[str, ...], Any]] = [
        ((name,), there[name]) for name in USUAL if name in there and _is_usual(name, there)
    ]
    prompts, answers = ([name for name in names if name in there] for names in (PROMPTS, ANSWERS))
    if len(prompts) == len(answers) == 1:
        names = (*prompts, *(["input"] if "input" in there and prompts == ["instruction"] else []), *answers)
        ways.append((names, conversation(names, [there[name] for name in names])))
    if len(ways) == 1 and ways[0][1] is not None:
        return ways[0]
    if len(record) == 1 and not ways:  # whatever it is called, it is meant
        ((name, value),) = record.items()
        if name in there and (isinstance(value, str) or hasattr(value, "__len__")):
            return (name,), value
    return (), None


def _is_usual(name: str, there: Mapping[str, Any]) -> bool:
    """Whether a field of a usual name holds what it usually holds; a message's own `content` is no text."""
    return (
        isinstance(there[name], str) and "role" not in there if name == "content" else not isinstance(there[name], str)
    )


def _nested(value: Any) -> list[list[Any]]:
    """Rows of whatever holds token ids, or a mask of them: one row, [T], or several, [B, T] or lists."""
    if isinstance(value, (str, bytes, Mapping)):
        raise TypeError
    items = value.tolist() if hasattr(value, "tolist") else list(value)
    lists = [item.tolist() if hasattr(item, "tolist") else item for item in items]
    if any(isinstance(item, Sequence) for item in lists):
        return [list(item) for item in lists]
    return [lists]


def _id_rows(name: str, value: Any, there: Mapping[str, Any], where: str, *, labels: bool) -> list[Row]:
    """Rows of token ids without what their mask leaves out, and with what is learnt of them, if that is told."""
    try:
        rows = [[operator.index(token) for token in row] for row in _nested(value)]
    except (TypeError, ValueError):
        kind = "list" if name == "input_ids" else "text, no chat and no list"
        raise DataError(
            f"{where}: {name} is no {kind} of whole numbers, [tokens] or [rows, tokens], but {described(value)}"
        ) from None
    learnt: list[list[int]] | None = None
    try:
        for key in (LABELS, *LEARNT) if labels else ():
            if key in there:
                beside = _fitting(key, there[key], rows, where)
                learnt = [
                    [operator.index(label) for label in row]
                    if key == LABELS
                    else [label if real else IGNORED for label, real in zip(known, row, strict=True)]
                    for known, row in zip(learnt or rows, beside, strict=True)
                ]
    except TypeError:
        raise DataError(f"{where}: {key} are no whole numbers") from None
    if MASK in there:
        keep = [[bool(real) for real in row] for row in _fitting(MASK, there[MASK], rows, where)]
        rows = [list(compress(row, real)) for row, real in zip(rows, keep, strict=True)]
        learnt = learnt and [list(compress(row, real)) for row, real in zip(learnt, keep, strict=True)]
    return [(row, learnt[number] if learnt else None) for number, row in enumerate(rows)]


def _fitting(name: str, value: Any, rows: list[list[int]], where: str) -> list[list[Any]]:
    """The rows of a column that has a value for every token id."""
    try:
        found = _nested(value)
        fits = list(map(len, found)) == list(map(len, rows))
    except (TypeError, ValueError):
        found, fits = [], False
    if not fits:
        ids = str(len(rows[0])) if len(rows) == 1 else f"{len(rows)} rows of"
        raise DataError(f"{where}: {name} must have a value for each of its {ids} token ids, and is {described(value)}")
    return found


def shown(name: Any) -> str:
    """A column's name in one line of characters that can be printed."""
    return repr(str(name))[1:-1]


def described(value: Any) -> str:
    """What a value is, for messages: its dtype and shape, its length, or its type."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {kind} of {len(value)} {type(value[0]).__name__}" if value else f"an empty {kind}"
    return "null" if value is None else f"a value of type {kind}"

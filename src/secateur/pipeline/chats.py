"""Chats as data sets hold them -> messages that a chat template knows -> text."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError

log = logging.getLogger("secateur")

OPTIONS = ("tools", "documents", "chat_template_kwargs")  # columns beside a chat that its template takes
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
PROBE = "gardener"


@dataclass(frozen=True)
class Chat:
    """A chat.

    Attributes:
        messages: {"role", "content", …}, without fields that are null.
        options: what the template takes besides (`OPTIONS`).
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


def as_chat(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the messages of a chat; None if a value is none.

    Raises:
        DataError: a message of ShareGPT's form has no value.
    """
    if isinstance(value, Mapping) and value and all(isinstance(part, (list, tuple)) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]  # by columns
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        return None
    return [_message(without_nulls(one), where) for one in value]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with a role; ShareGPT's {"from", "value"} is renamed."""
    if "role" in message or "content" in message or "from" not in message:
        return message
    if "value" not in message:
        raise DataError(f"{where}: a message from {message['from']!r} has no value")
    speaker = str(message["from"])
    return {"role": ROLES.get(speaker, speaker), "content": message["value"]}


def without_nulls(value: Any) -> Any:
    """A value without its fields that are null: parquet gives every message the fields of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [without_nulls(part) for part in value] if isinstance(value, (list, tuple)) else value


def conversation(names: Sequence[str], values: Sequence[Any]) -> str | list[Any] | None:
    """What a prompt and its answer make together; None if that is not clear.

    A completion continues its prompt. What is called otherwise (response, output, answer) answers it as another
    speaker does. Either may be messages already.
    """
    if all(isinstance(value, str) for value in values):
        if names[-1] == "completion":
            return "".join(values)
        return [
            {"role": "user", "content": "\n".join(part for part in values[:-1] if part)},
            {"role": "assistant", "content": values[-1]},
        ]
    turns: list[Any] = []
    for role, value in zip(("user", "assistant"), (values[0], values[-1]), strict=True):
        if isinstance(value, str):
            turns.append({"role": role, "content": value})
        elif isinstance(value, (list, tuple)) and all(isinstance(part, Mapping) for part in value):
            turns += value
        else:
            return None
    return turns if len(values) == 2 else None


def as_texts(texts: Sequence[str | Chat], tokenizer: Any, name: str) -> list[str]:
    """Return texts as they are, and chats as the tokenizer's template shows them.

    Raises:
        DataError: there is no template, or a chat does not fit it.
    """
    chats = [text for text in texts if isinstance(text, Chat)]
    if chats and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{name}: has chats, and the model's tokenizer has no chat template; give text, or choose a column of it"
        )
    plain = any(map(_has_parts, chats)) and not knows_parts(tokenizer)
    left = sum(_other_parts(chat) for chat in chats) if plain else 0
    if left:
        log.warning("%s: %d parts of messages that are no text are left out; the template knows text alone", name, left)
    found, told = [], False
    for text in texts:
        if isinstance(text, str):
            found.append(text)
            continue
        shown = _shown(text, tokenizer, name, plain=plain)
        if text.options and not told:
            told = True
            _tell_unused(text, shown, tokenizer, name, plain=plain)
        found.append(shown)
    return found


def _shown(chat: Chat, tokenizer: Any, name: str, *, plain: bool, without: str = "") -> str:
    """A chat as the template shows it."""
    try:
        messages = [_joined(message) for message in chat.messages] if plain else chat.messages
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **_arguments(chat.options, without))
    except Exception as error:  # whatever the template raises
        what = " ".join(str(error).split())[:120]
        raise DataError(f"{name}: a chat does not fit the tokenizer's template ({what})") from None
    return text


def _arguments(options: Mapping[str, Any], without: str) -> dict[str, Any]:
    """A template's arguments; JSON in a string, as columns of parquet hold it, is opened."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key == without:
            continue
        value = without_nulls(json.loads(value) if isinstance(value, str) else value)
        if key == "chat_template_kwargs":
            found |= dict(value)
        else:
            found[key] = [json.loads(one) if isinstance(one, str) else one for one in value]
    return found


def _tell_unused(chat: Chat, shown: str, tokenizer: Any, name: str, *, plain: bool) -> None:
    """Say which tools or documents a template takes no notice of."""
    for key in ("tools", "documents"):
        if key in chat.options and _same(chat, shown, tokenizer, plain=plain, without=key):
            log.warning("%s: the tokenizer's chat template shows no %s, so they are left out", name, key)


def _same(chat: Chat, shown: str, tokenizer: Any, *, plain: bool, without: str) -> bool:
    """Whether a chat looks the same without one of its options; a template that needs it does not."""
    try:
        return _shown(chat, tokenizer, "", plain=plain, without=without) == shown
    except DataError:
        return False


def knows_parts(tokenizer: Any) -> bool:
    """Whether a template knows messages whose content is a list of parts."""
    part = {"type": "text", "text": PROBE}
    try:
        shown = tokenizer.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)
    except Exception:  # whatever the template raises
        return False
    return PROBE in shown and not any(quoted in shown for quoted in ("'type'", '"type"'))


def _has_parts(chat: Chat) -> bool:
    return any(isinstance(message.get("content"), list) for message in chat.messages)


def _other_parts(chat: Chat) -> int:
    """How many parts are no text."""
    contents = [message["content"] for message in chat.messages if isinstance(message.get("content"), list)]
    return sum(_text_of(part) is None for parts in contents for part in parts)


def _text_of(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else None


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the text of its parts in their place."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(filter(None, map(_text_of, content)))}

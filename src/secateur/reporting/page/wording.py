"""Recorded values as words for a page."""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

MINUS = "\u2212"
# What would reorder, hide or break the text around it: shown by its code instead.
DIRECTION = re.compile("[\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
LARGEST = 1e300


def tidy(value: Any) -> Any:
    """Return recorded data such that nothing in it breaks a page or a picture.

    Control characters (terminal colours, too) become pictures of themselves, marks that reorder text their codes;
    a number that is not finite becomes None. Keys are treated like values.

    >>> tidy({"a\\x1b": [float("inf"), "b\\u202e"]})
    {'a␛': [None, 'b[U+202E]']}
    """
    if isinstance(value, str):
        value = DIRECTION.sub(lambda mark: f"[U+{ord(mark[0]):04X}]", value.replace("\r\n", "\n").replace("\r", "\n"))
        return CONTROL.sub(lambda mark: "\u2421" if mark[0] == "\x7f" else chr(0x2400 + ord(mark[0])), value)
    if isinstance(value, Mapping):
        return {tidy(key): tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(item) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if abs(value) < LARGEST else None  # False for NaN
    return value


def short(text: str, most: int = 60) -> str:
    """One line of at most `most` characters: the beginning and the end of a longer text.

    A text that holds words written from right to left is isolated from what stands around it.

    >>> short("model.layers", 9)
    'mode…yers'
    """
    text = " ".join(text.split()) or "(no name)"
    half = (most - 1) // 2
    text = text if len(text) <= most else f"{text[: most - 1 - half]}…{text[-half:]}"
    mixed = any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
    return f"\u2068{text}\u2069" if mixed else text


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction for people.

    >>> percent(0.5)
    '50.00%'
    """
    return "not measured" if fraction is None else f"{fraction:.{digits}%}".replace("-", MINUS)


def digits(value: float | None) -> str:
    """A number for people, to four digits.

    >>> digits(29.1899), digits(1234567.0), digits(0.00012)
    ('29.19', '1,234,567', '0.00012')
    """
    if value is None:
        return "not measured"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", MINUS)
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", MINUS)


def change(value: float | None, form: str = ".2f") -> str:
    """A difference, with its sign.

    >>> change(-0.041, ".1%"), change(36.5)
    ('−4.1%', '+36.50')
    """
    return "" if value is None else f"{value:+{form}}".replace("-", MINUS)


def points(value: float | None) -> str:
    """A difference of two fractions, in percentage points.

    >>> points(-0.041)
    '−4.1 points'
    """
    return "" if value is None else f"{100 * value:+.1f} points".replace("-", MINUS)


def ratio(after: float | None, before: float | None) -> float | None:
    """How many times; None where one of both is not known."""
    if after is None or not before:
        return None
    return None if math.isinf(after / before) else after / before


def difference(after: float | None, before: float | None) -> float | None:
    """What was added; None where one of both is not known."""
    return None if after is None or before is None else after - before


def listing(words: Iterable[str]) -> str:
    """Words in a sentence.

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    items = list(words)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def counted(count: int, what: str, several: str | None = None) -> str:
    """How many of a thing.

    >>> counted(1, "block"), counted(30, "block"), counted(2, "matrix", "matrices")
    ('1 block', '30 blocks', '2 matrices')
    """
    return f"{count:,} {what if count == 1 else several or what + 's'}"


def course(values: Mapping[int, float], what: str, form: Any = digits) -> str:
    """What a picture of one value per block shows, in words.

    >>> course({0: 0.25, 1: 0.5, 2: 0.375}, "Error")
    'Error is 0.25 in block 0 and 0.375 in block 2; it is largest in block 1, 0.5, and smallest in block 0, 0.25.'
    """
    first, last = min(values), max(values)
    if first == last:
        return f"{what} is {form(values[first])} in block {first}."
    high, low = max(values, key=lambda block: values[block]), min(values, key=lambda block: values[block])
    return (
        f"{what} is {form(values[first])} in block {first} and {form(values[last])} in block {last}; it is largest in "
        f"block {high}, {form(values[high])}, and smallest in block {low}, {form(values[low])}."
    )


def measuring(command: str, model: str, *options: str) -> str:
    """The command that measures something of a model.

    >>> measuring("bench", "my model", "--against", "smollm2")
    "secateur bench 'my model' --against smollm2"
    """
    return shlex.join(["secateur", command, model, *options])

"""How long work tells that it goes on: the library calls a `Progress`, the command line draws it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears of one task at a time."""

    def start(self, task: str, total: float, done: float = 0) -> None:
        """A task begins, `done` of its `total` units finished by an earlier run."""

    def advance(self, done: float = 1, note: str | None = None) -> None:
        """`done` more units are finished; `note` says what is being worked on."""

    def finish(self) -> None:
        """The task is over."""


class Silent:
    """A progress that nobody sees."""

    def start(self, task: str, total: float, done: float = 0) -> None: ...

    def advance(self, done: float = 1, note: str | None = None) -> None: ...

    def finish(self) -> None: ...

"""Small files written whole or not at all, and room on the disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from ..errors import OutputError, unwritable


def into_place(part: Path, path: Path) -> None:
    """Rename, and see the name itself on the disk where the system lets directories be flushed."""
    os.replace(part, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems that cannot do it
                raise
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        into_place(part, path)
    except OSError as error:
        raise OutputError(f"{path}: {unwritable(error)}") from error


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise OutputError if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder}: {what} takes {needed / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are free; make room "
            "or choose an OUTPUT on another disk"
        )

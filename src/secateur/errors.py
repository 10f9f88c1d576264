"""Every failure that a user can cause or meet, as one line: what, where, what to do.

    SecateurError
    ├── OptionError        an option, or two options together, that cannot be carried out
    ├── ModelError         a model that cannot be opened, read or pruned
    ├── DataError          a calibration or evaluation text that cannot be used
    ├── OutputError        an output or run directory that cannot be written
    │   └── ResumeError    one that belongs to another plan
    └── NumericsError      NaN or Inf, or a matrix that no solver can take

The command line prints the message and exits with 1; Python code catches `SecateurError`.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of all errors that Secateur raises on purpose."""


class OptionError(SecateurError, ValueError):
    """An option, or a combination of options, that cannot be carried out."""


class ModelError(SecateurError):
    """A model that cannot be opened, read or pruned."""


class DataError(SecateurError):
    """A text or a set of tokens that cannot be used."""


class OutputError(SecateurError):
    """An output or run directory that cannot be written."""


class ResumeError(OutputError):
    """An output or run directory that belongs to another plan."""


class NumericsError(SecateurError):
    """NaN or Inf in weights or activations, or a matrix that no solver can take."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"did you mean a or b?"`` for the known words closest to `word`, or list them all.

    >>> nearest("wnada", ["magnitude", "wanda"])
    'did you mean wanda?'
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"


FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
OCCUPIED = {errno.EEXIST, errno.ENOTDIR}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def unwritable(error: OSError) -> str:
    """Return what the system says of a file that it will not write, and what to do about it.

    >>> unwritable(OSError(errno.ENOSPC, "No space left on device"))
    'cannot be written (No space left on device); make room and give the same command again'
    """
    hint = "; make room and give the same command again" if error.errno in FULL else ""
    hint = "; check who may write there" if error.errno in FORBIDDEN else hint
    hint = "; a file stands where a directory is needed" if error.errno in OCCUPIED else hint
    return f"cannot be written ({error.strerror or error}){hint}"

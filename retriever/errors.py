"""Errors that a user can mend."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """Something that came from outside is wrong: a file, a value, a folder.

    The message is one line: what was wrong, the value got, what to do. The command line prints it and
    exits with code 2.
    """

"""Mistakes a user can make, and how a program tells them: one line each, no traceback."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Something the user can mend: the message names the key, file or stage and says what to do."""


class Stopped(Exception):
    """The program was asked to stop and has saved its state; `signal` is the number of the signal that asked."""

    def __init__(self, signal: int, message: str) -> None:
        self.signal = signal
        super().__init__(message)


def program(main: Callable[P, None]) -> Callable[P, None]:
    """Wrap a program's `main`: a user's mistake prints one line on stderr and leaves with status 1."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            sys.exit(f"error: {error}")
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(128 + stopped.signal)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of a pipe went away: `… | head`
            sys.stderr.close()
            sys.exit(141)
        except OSError as error:
            name, reason = error.filename or "a file", error.strerror
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                sys.exit(f"error: no room to write {name} ({reason}): free some space and run again")
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                sys.exit(f"error: cannot use {name} ({reason}): see to its permissions")
            if error.filename:
                sys.exit(f"error: cannot use {name} ({reason})")
            raise

    return run

"""How a command ends: 0 done, 1 our bug, 2 the user's mistake, 3 it ran and the answer is no, 130
and 143 stopped by SIGINT and SIGTERM.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from recipe.settings import RunFailed, Stopped, UserError


def run_command(main: Callable[[], None]) -> int:
    """Run ``main`` and turn what people can act on into a message and an exit code.

    Anything else is our bug: its traceback stays and Python exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        if error.told_here:  # the processes of a host mostly find the same
            _tell(error)
        return 2
    except RunFailed as error:
        _tell(error)
        return 3
    except Stopped as stopped:
        _tell(stopped)  # empty for all but the first of several processes
        return 128 + stopped.signal_number
    except BrokenPipeError:
        # Whoever read the screen has seen enough; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _tell("stopped")
        return 130
    return 0


def _tell(message: object) -> None:
    """The exit code stands even if a Ctrl-C has killed what reads the screen, such as ``tee``."""
    if str(message):
        with suppress(BrokenPipeError):
            print(message, file=sys.stderr)

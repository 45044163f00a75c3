"""How a command ends: 0 done, 1 our bug, 2 the user's mistake, 3 it ran and the answer is no, 130
and 143 stopped by SIGINT and SIGTERM.
"""

import io
import os
import sys
from collections.abc import Callable

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
        print(error, file=sys.stderr)
        return 2
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 3
    except Stopped as stopped:
        if str(stopped):  # the first of several processes says it
            print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except BrokenPipeError:
        # Whoever read the screen has seen enough; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0

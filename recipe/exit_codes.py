"""How a command ends: 0 done, 1 our bug, 2 the user's mistake, 3 it ran and the answer is no."""

import sys
from collections.abc import Callable

from recipe.settings import RunFailed, UserError


def run_command(main: Callable[[], None]) -> int:
    """Run ``main`` and turn what people can act on into a message and an exit code.

    Anything else is our bug: its traceback stays and Python exits with 1.
    """
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0

"""A process that answers requests to run code, so that many tests pay for the imports once.

One line of JSON in, one line out. What a request prints is caught at the file descriptors: the
handlers that libraries made at their import write there, and so does what is not Python.
"""

import importlib
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.utils import build_hf_headers


def run_module(request: dict[str, Any]) -> int:
    """As ``python -m MODULE ARGV`` of a command of the recipe ends."""
    from recipe.exit_codes import run_command

    module = importlib.import_module(request["module"])
    sys.argv = [str(module.__file__), *request["argv"]]
    return run_command(lambda: module.main(request["argv"]))


def run_file(request: dict[str, Any]) -> int:
    sys.argv = [request["file"], *request["argv"]]
    runpy.run_path(request["file"], run_name="__main__")
    return 0


def ended(run: Callable[[], int]) -> int:
    """The exit code that Python would end with; a traceback goes where Python would print it."""
    try:
        return run()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1


def answer(request: dict[str, Any], out: Path, err: Path) -> dict[str, Any]:
    os.environ.pop("HF_TOKEN", None)
    if request["token"] is not None:
        os.environ["HF_TOKEN"] = request["token"]
    os.chdir(request["cwd"])
    for descriptor, file in ((1, out), (2, err)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    start = time.perf_counter()
    code = ended(lambda: (run_module if "module" in request else run_file)(request))
    sys.stdout.flush()
    sys.stderr.flush()
    return {"code": code, "seconds": time.perf_counter() - start}


def main() -> None:
    out, err, repository = (Path(argument) for argument in sys.argv[1:])
    sys.path.append(str(repository))
    replies = os.fdopen(os.dup(1), "w")
    # Nobody else reads the requests, or answers a prompt.
    requests = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # The first headers that a process builds cost it a request of its own, for a list that the
    # real hub keeps. Here it is in no test's way.
    build_hf_headers()
    print("ready", file=replies, flush=True)
    for line in requests:
        print(json.dumps(answer(json.loads(line), out, err)), file=replies, flush=True)


if __name__ == "__main__":
    main()

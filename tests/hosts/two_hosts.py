"""Two hosts on one machine train one run; one is lost in the middle, and they go on.

    make bench-hosts
    make bench-hosts ARGS="--processes 4 --patience 120"

The hosts are network namespaces with a cable between them; on each a launcher of its own is
started, as on two machines that share a folder. Needs Linux, util-linux and iproute2, and either
root or a system that lets users make namespaces. Exit 3 if a claim does not hold; the folder with
all that was printed then stays.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.hosts import link


def main() -> int:
    args = parse()
    if not link.inside():
        reason = link.why_not()
        if reason:
            print(f"two hosts cannot be made here: {reason}", file=sys.stderr)
            return 2
        return link.run_inside([sys.executable, "-m", "tests.hosts.two_hosts", *sys.argv[1:]])
    link.guard()
    from tests.hosts.scenes import play

    folder = Path(tempfile.mkdtemp(prefix="two-hosts-", dir=args.folder))
    try:
        found = play(folder, processes=args.processes, patience=args.patience)
    except RuntimeError as error:
        print(f"{error}\n{folder} stays", file=sys.stderr)
        return 3
    print()
    for claim, holds in found.items():
        print(f"{'holds ' if holds else 'FAILS '} {claim}")
    if not all(found.values()):
        print(f"{folder} stays")
        return 3
    shutil.rmtree(folder)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, choices=(2, 4), default=2, help="on both together")
    parser.add_argument(
        "--patience", type=float, default=180.0, help="seconds for a host to notice"
    )
    parser.add_argument("--folder", default=tempfile.gettempdir())
    return parser.parse_args()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())

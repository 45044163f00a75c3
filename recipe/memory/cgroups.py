"""What the control groups of a container or a batch job leave of the memory that they limit.

https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files and, of version 1,
https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """Of the files that tell limit and use, and of the line on cached files that can be dropped."""

    limit: str
    used: str
    droppable: str


_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")


def left_by_cgroups(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int | None:
    """Bytes that this process's groups, and those that these lie in, leave it: the least of them.
    None where there is no limit, or none that can be read.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # another system, or a sandbox
        return None
    left = [_left(folder, names) for folder, names in _groups(lines, mount)]
    return min((count for count in left if count is not None), default=None)


def _groups(lines: Iterable[str], mount: Path) -> Iterator[tuple[Path, _Names]]:
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = mount / "memory" if controllers else mount
        # In a container the path may be that outside of it; what limits it then lies at the top.
        folder = top / path.lstrip("/")
        while folder != top:
            yield folder, _VERSION_1 if controllers else _VERSION_2
            folder = folder.parent
        yield top, _VERSION_1 if controllers else _VERSION_2


def _left(folder: Path, names: _Names) -> int | None:
    try:
        limit = (folder / names.limit).read_text().strip()
        if limit == "max":
            return None
        used = int((folder / names.used).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
        droppable = dict(line.split(" ", 1) for line in stat).get(names.droppable, "0")
        return max(int(limit) - used + int(droppable), 0)
    except (OSError, ValueError):  # no such group here, or none that may be read
        return None

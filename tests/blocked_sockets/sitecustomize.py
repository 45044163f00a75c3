"""No Python process of the test suite talks to anything but its own machine.

Python imports ``sitecustomize`` at its start. ``tests/conftest.py`` puts this folder on PYTHONPATH,
so that each process which a test starts blocks itself before its first line, and calls ``block``
for the process of pytest. An audit hook cannot be taken out again, and sees what Python's own
socket module does; sockets that libraries open in C++ or Rust pass by it, as gloo's do.
"""

import importlib.machinery
import importlib.util
import ipaddress
import sys
from pathlib import Path

_CONNECTS = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_LOOKS_UP = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}


class BlockedCall(RuntimeError):
    """No OSError: libraries take those for a network that is down, and go on."""


def block() -> None:
    """From here on, whatever leaves this machine raises ``BlockedCall``."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple) -> None:
    if event in _CONNECTS:
        connection, address = arguments
        # AF_INET and AF_INET6 have a host first; AF_UNIX has a path, netlink numbers.
        if connection.family.name in ("AF_INET", "AF_INET6") and address:
            _check(event, address[0])
    elif event in _LOOKS_UP:
        _check(event, arguments[0])


def _check(event: str, host: object) -> None:
    name = host.decode() if isinstance(host, bytes | bytearray) else host
    if not _is_here(name):
        raise BlockedCall(f"the tests use no network, and {event} was called for {name!r}")


def _is_here(host: object) -> bool:
    """No host at all is this machine, and so are loopback and its own name."""
    if not host or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        import socket

        return host == socket.gethostname()
    return address.is_loopback or address.is_unspecified


def _go_on() -> None:
    """Import the ``sitecustomize`` that this one hides, if the machine has one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    block()
    _go_on()

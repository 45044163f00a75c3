"""Two hosts on one machine: network namespaces with a cable between them and no other network.

All of it lives in a PID namespace of its own: when its first process ends, however it ends, the
kernel kills what is left and takes the namespaces away. They have no names that could stay behind.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_OWN_PROCESSES = ["--pid", "--fork", "--kill-child", "--mount-proc"]
_WORLD = ["unshare", "--user", "--map-root-user", "--net", *_OWN_PROCESSES]
_HOST = ["unshare", "--net", "--uts"]
# A launcher's trainers have sessions of their own, so no process group holds them all.
_POWERED = ["unshare", *_OWN_PROCESSES]
_INSIDE = "TWO_HOSTS_INSIDE"
NETWORK_CARD = "eth0"


def why_not() -> str:
    """Why this system makes no such hosts; empty if it does."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, and this is {sys.platform}"
    missing = [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]
    if missing:
        return f"no {' and no '.join(missing)} here; they come with util-linux and iproute2"
    make = f"ip link add {NETWORK_CARD} type veth && {' '.join(_HOST)} hostname trial"
    tried = subprocess.run([*_WORLD, "sh", "-c", make], capture_output=True, text=True, timeout=60)
    said = " ".join(tried.stderr.split())
    return f"this system lets nobody make network namespaces: {said}" if tried.returncode else ""


def inside() -> bool:
    return _INSIDE in os.environ


def run_inside(command: Sequence[str]) -> int:
    """Run ``command`` as the first process of a world; its exit code. It must call ``guard``."""
    environment = {**os.environ, _INSIDE: "1"}
    # The pipe closes when this process ends, even by SIGKILL.
    with subprocess.Popen([*_WORLD, *command], stdin=subprocess.PIPE, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            return 130
        finally:
            process.kill()


def guard() -> None:
    """End this world when the process outside has gone."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(143)

    threading.Thread(target=wait, daemon=True).start()


class Running:
    """What was started on a host: its launcher and all that this started."""

    def __init__(self, host: "Host", process: subprocess.Popen[bytes], log: Path) -> None:
        self.host = host
        self.log = log
        self._process = process

    def code(self) -> int | None:
        """How it ended; None while it is on."""
        return self._process.poll()

    def cut_power(self) -> int:
        """SIGKILL to every process at once; how many, when none is left."""
        count = len(set(self.host.processes()) - {self._process.pid})  # that is unshare
        self._process.kill()
        self._process.wait()
        while self.host.processes():
            time.sleep(0.005)
        return count

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


class Host:
    """A network and a host name of its own; the file system is shared with the other."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        # It keeps the network when everything else on the host has been killed.
        self._holder = subprocess.Popen(
            [*_HOST, "sh", "-c", f"hostname {name} && echo ready && exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{name}: no namespace")

    @property
    def process(self) -> int:
        return self._holder.pid

    def _enter(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self.process), "--net", "--uts", "--", *command]

    def plug_in(self) -> None:
        subprocess.run(self._enter("ip", "link", "set", "lo", "up"), check=True)
        add = ("ip", "address", "add", f"{self.address}/24", "dev", NETWORK_CARD)
        subprocess.run(self._enter(*add), check=True)
        self.link("up")

    def link(self, state: str) -> None:
        """``down``: nothing arrives any more, and nobody is told."""
        subprocess.run(self._enter("ip", "link", "set", NETWORK_CARD, state), check=True)

    def start(
        self, command: Sequence[str], *, log: Path, folder: Path, environment: Mapping[str, str]
    ) -> Running:
        with log.open("ab") as stream:
            process = subprocess.Popen(
                self._enter(*_POWERED, *command),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **environment},
            )
        return Running(self, process, log)

    def processes(self) -> list[int]:
        """All in its network but the holder."""
        network = Path(f"/proc/{self.process}/ns/net").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == self.process:
                continue
            try:
                if (entry / "ns/net").readlink() == network:
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
        return found

    def end(self) -> None:
        for process in self.processes():
            os.kill(process, signal.SIGKILL)
        self._holder.kill()
        self._holder.wait()


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Call it ``inside``."""
    alpha, beta = Host("alpha", "10.77.0.1"), Host("beta", "10.77.0.2")
    try:
        ends = [f"name {NETWORK_CARD} netns {host.process}".split() for host in (alpha, beta)]
        cable = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
        subprocess.run(cable, check=True)
        alpha.plug_in()
        beta.plug_in()
        yield alpha, beta
    finally:
        alpha.end()
        beta.end()

"""What goes wrong when a test asks for it."""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Requests whose "METHOD /path?query" contains ``match`` (a regular expression) go wrong.

    The first ``after`` of them pass, the next ``times`` do not (None: all from there on). Which of
    the following happens is the test's choice; ``delay`` and ``first`` go with any other.
    """

    match: str
    times: int | None = 1
    after: int = 0
    # Answered in place of the hub, which does not see the request.
    status: int | None = None
    retry_after: int | None = None
    error: str = "a fault of the test"
    code: str | None = None
    # The hub does what was asked, says how long its answer is, sends this many bytes and hangs up.
    cut: int | None = None
    # Hangs up after this many bytes of what the client sends; without a body, before any answer.
    cut_upload: int | None = None
    # One bit in the middle of the answer's body is another, the length is not.
    corrupt: bool = False
    # Seconds before anything happens.
    delay: float = 0.0
    # Called before anything happens: somebody else is faster.
    first: Callable[[], object] | None = None
    # How many requests it has hit.
    hits: int = field(default=0, init=False)
    _seen: int = field(default=0, init=False)

    def takes(self, line: str) -> bool:
        if not re.search(self.match, line):
            return False
        self._seen += 1
        if self._seen <= self.after or (self.times is not None and self.hits >= self.times):
            return False
        self.hits += 1
        return True

    def damaged(self, body: bytes) -> bytes:
        """``body`` as it leaves: with one bit flipped where ``corrupt`` asks for it."""
        if not self.corrupt or not body:
            return body
        wrong = bytearray(body)
        wrong[len(wrong) // 2] ^= 1
        return bytes(wrong)


class Faults:
    """Those of one hub; a request meets the first that takes it, and no other."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._one_at_a_time = threading.Lock()

    def add(self, *faults: Fault) -> None:
        with self._one_at_a_time:
            self._faults += faults

    def clear(self) -> None:
        with self._one_at_a_time:
            self._faults.clear()

    def pick(self, line: str) -> Fault | None:
        with self._one_at_a_time:
            return next((fault for fault in self._faults if fault.takes(line)), None)

"""HTTP/1.1 for the hub: requests read whole, answers sent whole, faults where a test wants them."""

import contextlib
import gzip
import itertools
import json
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.hub.faults import Fault, Faults

_NUMBERS = itertools.count(1)


class Problem(Exception):
    """An answer that says no, with the headers by which clients tell one reason from another."""

    def __init__(
        self, status: int, message: str, code: str | None = None, **headers: str | None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items() if value}

    def response(self) -> "Response":
        # A header is one line of Latin-1; the body has the message as it is.
        line = " ".join(str(self).split()).encode("latin-1", "replace").decode("latin-1")
        headers = {"X-Error-Message": line, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return Response.of_json({"error": str(self)}, self.status, headers)


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        """Still quoted: a branch may have a slash in its name."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("true", "1")

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise Problem(400, f"the body is no JSON: {error}") from error


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
        # Dates out of somebody's YAML are no JSON.
        body = json.dumps(value, default=str).encode()
        return Response(
            status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        )

    def part(self, asked: str | None) -> "Response":
        """The bytes that a Range header asks for; the whole where it asks for none."""
        headers = {"Accept-Ranges": "bytes", **self.headers}
        size = len(self.body)
        unit, _, span = (asked or "").partition("=")
        first, _, last = span.partition("-")
        if self.status != 200 or unit != "bytes" or not (first or last):
            return Response(self.status, self.body, headers)
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            return Response(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(206, self.body[start:stop], headers)


@dataclass
class Record:
    """A request as it arrived; ``status`` is 0 until it is answered, and for ever if it is not."""

    place: str
    method: str
    path: str
    host: str
    authorization: str | None
    status: int = 0

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Book:
    """What a server has seen since the last reset."""

    requests: list[Record] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    crashes: list[str] = field(default_factory=list)


class Server(ThreadingHTTPServer):
    """On loopback, at a free port; ``answer`` is asked for each request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, place: str, book: Callable[[], Book]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.place = place
        self.book = book
        self.answer: Callable[[Request], Response]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours; anything else is in the book already."""


class HungUp(Exception):
    """The connection is to be dropped, as a fault asks or because the client dropped it."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the screen: the book has it."""

    def serve(self) -> None:
        book = self.server.book()
        record = Record(
            self.server.place,
            self.command,
            self.path,
            self.headers.get("Host", ""),
            self.headers.get("Authorization"),
        )
        book.requests.append(record)
        fault = book.faults.pick(record.line) or Fault("")
        try:
            time.sleep(fault.delay)
            if fault.first:
                fault.first()
            body = self._body(fault.cut_upload)
            if fault.status is not None:
                headers = (
                    {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                )
                response = Problem(fault.status, fault.error, fault.code).response()
                response.headers.update(headers)
            else:
                response = self._answer(
                    Request(self.command, self.path, _plain(self.headers), body)
                )
            record.status = response.status
            self._send(response, fault)
        except (HungUp, ConnectionError):
            self._hang_up()
        except Exception:
            book.crashes.append(f"{record.line}\n{traceback.format_exc()}")
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def _answer(self, request: Request) -> Response:
        try:
            return self.server.answer(request)
        except Problem as problem:
            return problem.response()

    def _body(self, cut: int | None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            return self._chunks(cut)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length if cut is None else min(cut, length))
        if cut is not None or len(body) < length:
            raise HungUp
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _chunks(self, cut: int | None) -> bytes:
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if cut is not None and len(body) >= cut:
                raise HungUp
        self.rfile.readline()
        if cut is not None:
            raise HungUp
        return body

    def _send(self, response: Response, fault: Fault) -> None:
        body = fault.damaged(response.body)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", f"loopback-{next(_NUMBERS)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if fault.cut is None else body[: fault.cut])
        if fault.cut is not None:
            raise HungUp

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def _plain(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}

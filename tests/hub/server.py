"""A model hub on loopback: the hub itself at 127.0.0.1, its storage service at localhost.

The two are one machine, and for an HTTP client two hosts: a token meant for the first must not
reach the second, which is how the real hub and its storage stand to each other.
"""

import hashlib
import hmac
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

# Each of the three registers its routes.
from tests.hub import about_repositories, downloads, uploads  # noqa: F401
from tests.hub.accounts import Accounts, Token
from tests.hub.faults import Faults
from tests.hub.repositories import Repositories, Repository
from tests.hub.routes import State, dispatch
from tests.hub.wire import Book, Problem, Record, Request, Response, Server

# Tokens of two people; alice's organisation has bob as a reader.
ALICE = "hf_alice_writes"
ALICE_READS = "hf_alice_reads"
BOB = "hf_bob_writes"
_OBJECT = re.compile(r"/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})(?:/(?P<part>\d+))?")


class Hub:
    """Two servers that live as long as the hub, and a state that ``reset`` replaces.

    The servers keep their ports because a client reads its endpoint once, at import.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="recipe-hub-"))
        self._servers = [Server("hub", lambda: self.book), Server("storage", lambda: self.book)]
        self.endpoint = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.storage = f"http://localhost:{self._servers[1].server_port}"
        self._servers[0].answer = lambda request: dispatch(self.state, request)
        self._servers[1].answer = self._store
        self._secret = b"signs what leads to the storage"
        self._resets = 0
        self.reset()
        for server in self._servers:
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
            ).start()

    def reset(self) -> None:
        """No repositories, faults or requests, and the first tokens again."""
        self._resets += 1
        shutil.rmtree(self._folder, ignore_errors=True)
        # Another folder each time: a request still on its way writes into the old one.
        repositories = Repositories(self._folder / str(self._resets))
        tokens = {ALICE: Token("alice"), ALICE_READS: Token("alice", "read"), BOB: Token("bob")}
        orgs = {"lab": {"alice": "admin", "bob": "read"}}
        self.state = State(repositories, Accounts(tokens, orgs), self.endpoint)
        self.state.storage_link = self.link
        self.book = Book()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def repositories(self) -> Repositories:
        return self.state.repositories

    @property
    def tokens(self) -> dict[str, Token]:
        return self.state.accounts.tokens

    @property
    def orgs(self) -> dict[str, dict[str, str]]:
        return self.state.accounts.orgs

    @property
    def faults(self) -> Faults:
        return self.book.faults

    @property
    def requests(self) -> list[Record]:
        """All requests in order of arrival."""
        return self.book.requests

    def lines(self, match: str = "", place: str | None = None) -> list[str]:
        """ "METHOD /path" of the requests in which ``match`` is found."""
        return [
            record.line
            for record in list(self.requests)
            if re.search(match, record.line) and place in (None, record.place)
        ]

    def create(
        self, identity: str, files: dict[str, bytes] | None = None, *, private: bool = False
    ) -> Repository:
        """A repository with one more commit of ``files``; large ones become pointers."""
        owner = identity.split("/")[0]
        repository = self.repositories.create(identity, private=private, owner=owner)
        if files:
            repository.commit(dict(files), "files", author=owner)
        return repository

    def link(self, method: str, identity: str, oid: str, part: int | None = None) -> str:
        """A signed link to the storage; it needs no token, and good storage wants none."""
        path = f"/{identity}/{oid}" + (f"/{part}" if part is not None else "")
        query = urlencode({"X-Amz-Signature": self._signature(method, path)})
        return f"{self.storage}{path}?{query}"

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()

    def _store(self, request: Request) -> Response:
        found = _OBJECT.fullmatch(request.path)
        method = "GET" if request.method == "HEAD" else request.method
        signed: Any = request.query.get("X-Amz-Signature", [""])[0]
        if not found or not hmac.compare_digest(signed, self._signature(method, request.path)):
            raise Problem(403, "SignatureDoesNotMatch")
        if method == "GET":
            return downloads.fetch(self.state, request, found["id"], found["oid"])
        part = found["part"] and int(found["part"])
        return uploads.store(self.state, request, found["id"], found["oid"], part)

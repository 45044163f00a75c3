"""Which function answers which request, and the checks that they share."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from tests.hub.accounts import Accounts, Token
from tests.hub.repositories import Moved, NotThere, Refused, Repositories, Repository
from tests.hub.wire import Problem, Request, Response


class State:
    """What the hub knows; a reset makes another one."""

    def __init__(self, repositories: Repositories, accounts: Accounts, endpoint: str) -> None:
        self.repositories = repositories
        self.accounts = accounts
        self.endpoint = endpoint
        # Signed for one method and one object, as links to a storage service are.
        self.storage_link: Callable[..., str]
        # Larger uploads go in parts of this many bytes; None: each in one.
        self.multipart: int | None = None


class Visit:
    """One request: who asks, and what for."""

    def __init__(self, state: State, request: Request, groups: dict[str, str]) -> None:
        self.state = state
        self.request = request
        self.groups = {name: unquote(value or "") for name, value in groups.items()}
        self.challenge = "Basic" if ".git/" in request.path else None
        self.token = self._who()

    def _who(self) -> Token | None:
        try:
            return self.state.accounts.who(self.request.headers.get("authorization"))
        except Problem as problem:
            raise self._unauthorized(str(problem)) from problem

    def _unauthorized(self, message: str, code: str | None = None) -> Problem:
        """Git shows its credentials only where it is challenged."""
        challenge = self.challenge and 'Basic realm="hub"'
        return Problem(401, message, code, WWW_Authenticate=challenge)

    def known(self) -> Token:
        if self.token is None:
            raise self._unauthorized("Invalid username or password.")
        return self.token

    @property
    def identity(self) -> str:
        return self.groups["id"]

    def readable(self, identity: str | None = None) -> Repository:
        """The repository, which is not there for those who may not know of it.

        Without a token the hub does not say whether it is missing or private, and answers 401.
        """
        repository = self.state.repositories.get(identity or self.identity)
        if repository is not None and self.state.accounts.reads(self.token, repository):
            return repository
        if self.token is None:
            raise self._unauthorized("Invalid username or password.", "RepoNotFound")
        raise Problem(404, "Repository not found", "RepoNotFound")

    def open(self) -> Repository:
        """As ``readable``, for its files: a gated repository shows them to its writers alone."""
        repository = self.readable()
        if repository.gated and not self.state.accounts.writes(self.token, repository.id):
            status = 401 if self.token is None else 403
            message = f"Access to model {repository.id} is restricted and you are not in the"
            raise Problem(status, f"{message} authorized list.", "GatedRepo")
        return repository

    def writable(self, identity: str | None = None) -> Repository:
        repository = self.readable(identity)
        if self.known().role == "read":
            raise Problem(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.state.accounts.writes(self.token, repository.id):
            raise Problem(
                403,
                "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request",
            )
        return repository


Answer = Callable[[Visit], Response]
ROUTES: list[tuple[str, re.Pattern[str], Answer]] = []
# Two segments: this hub has no models outside a namespace.
MODEL = r"(?P<id>[^/]+/[^/]+?)"


def route(methods: str, pattern: str) -> Callable[[Answer], Answer]:
    """``pattern`` is matched with the quoted path, whole; MODEL stands for a repository's name."""

    def register(answer: Answer) -> Answer:
        compiled = re.compile(pattern.replace("MODEL", MODEL))
        ROUTES.extend((method, compiled, answer) for method in methods.split())
        return answer

    return register


def dispatch(state: State, request: Request) -> Response:
    """What the first route that fits answers; what git could not do becomes the hub's words."""
    for method, pattern, answer in ROUTES:
        found = pattern.fullmatch(request.path)
        if found and method == request.method:
            try:
                return answer(Visit(state, request, found.groupdict()))
            except NotThere as error:
                raise missing(error) from error
            except Moved as error:
                raise Problem(409, str(error)) from error
            except Refused as error:
                raise Problem(400, str(error)) from error
    raise Problem(404, "Sorry, we can't find the page you are looking for.")


def missing(error: NotThere, commit: str | None = None) -> Problem:
    if error.what == "revision":
        return Problem(404, f"Invalid rev id: {error.name}", "RevisionNotFound")
    # With the commit the clients remember that the file is not there.
    return Problem(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit)


def date(seconds: str | float) -> str:
    """As the clients parse them: UTC is a Z, an offset is refused."""
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def json(value: Any, status: int = 200, **headers: str) -> Response:
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response.of_json(value, status, names)

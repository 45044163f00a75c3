"""Endpoints about repositories and people: who asks, create, delete, settings, info, references."""

import hashlib
import re
from typing import Any

import yaml

from tests.hub import card
from tests.hub.repositories import Moved, NotThere, Refused, Repository
from tests.hub.routes import Visit, date, json, route
from tests.hub.wire import Problem, Response

_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.A)


@route("GET", "/api/whoami-v2")
def whoami(visit: Visit) -> Response:
    return json(visit.state.accounts.whoami(visit.known()))


@route("POST", "/api/validate-yaml")
def validate_yaml(visit: Visit) -> Response:
    errors, warnings = card.judge(visit.request.json().get("content", ""))
    said = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return json(said, 400 if errors else 200)


def _named(visit: Visit) -> tuple[str, dict[str, Any]]:
    """The repository that a body names; without an organisation it is the asker's own."""
    asked = visit.request.json()
    if asked.get("type") not in (None, "model"):
        raise Problem(400, "this hub has models only")
    return f"{asked.get('organization') or visit.known().user}/{asked.get('name')}", asked


@route("POST", "/api/repos/create")
def create(visit: Visit) -> Response:
    token = visit.known()
    identity, asked = _named(visit)
    namespace, name = identity.split("/", 1)
    if not visit.state.accounts.writes(token, identity):
        message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        raise Problem(403, message)
    if not _NAME.fullmatch(name):
        raise Problem(400, f"Invalid repo name: {identity}")
    url = f"{visit.state.endpoint}/{identity}"
    private = asked.get("visibility") == "private" or asked.get("private") is True
    try:
        repository = visit.state.repositories.create(identity, private=private, owner=token.user)
    except Moved:
        return json({"error": "You already created this model repo", "url": url}, 409)
    return json({"url": url, "name": identity, "id": _id(repository)})


@route("DELETE", "/api/repos/delete")
def delete(visit: Visit) -> Response:
    repository = visit.writable(_named(visit)[0])
    visit.state.repositories.delete(repository.id)
    return json({})


@route("PUT", "/api/models/MODEL/settings")
def settings(visit: Visit) -> Response:
    repository = visit.writable()
    asked = visit.request.json()
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or asked.get("private") is True
    if "gated" in asked:
        repository.gated = asked["gated"]
    return json({"private": repository.private, "gated": repository.gated})


@route("GET", "/api/models/MODEL/auth-check(?P<write>/write)?")
def auth_check(visit: Visit) -> Response:
    if visit.groups["write"]:
        visit.writable()
    else:
        visit.open()
    return json({})


@route("GET", "/api/models/MODEL(/revision/(?P<revision>[^/]+))?")
def info(visit: Visit) -> Response:
    repository = visit.readable()
    return json(
        model_info(repository, visit.groups["revision"] or "main", visit.request.asks("blobs"))
    )


def model_info(repository: Repository, revision: str, blobs: bool) -> dict[str, Any]:
    commit = repository.resolve(revision)
    said = _card(repository, commit)
    history = repository.history(commit)
    files = [entry for entry in repository.entries(commit).values() if not entry.is_folder]
    siblings: list[dict[str, Any]] = [{"rfilename": entry.path} for entry in files]
    for sibling, entry in zip(siblings, files, strict=True):
        if blobs:
            sibling |= {"blobId": entry.oid, "size": entry.content_size}
        if blobs and entry.pointer:
            sizes = {"size": entry.pointer.size, "pointerSize": entry.size}
            sibling["lfs"] = {"sha256": entry.pointer.oid, **sizes}
    fields = {name: said[name] for name in ("library_name", "pipeline_tag") if name in said}
    return {
        "_id": _id(repository),
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.namespace,
        "sha": commit,
        "createdAt": date(history[-1]["seconds"]),
        "lastModified": date(history[0]["seconds"]),
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [*card.tags(said), "region:us"],
        **({"cardData": said} if said else {}),
        **fields,
        "siblings": siblings,
        "spaces": [],
        "usedStorage": sum(entry.content_size for entry in files),
    }


def _card(repository: Repository, commit: str) -> dict[str, Any]:
    try:
        readme = repository.blob(repository.entry(commit, "README.md").oid)
        said = card.metadata(readme.decode())
    except (NotThere, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return said if isinstance(said, dict) else {}


@route("GET", "/api/models/MODEL/refs")
def references(visit: Visit) -> Response:
    repository = visit.readable()

    def listed(kind: str) -> list[dict[str, str]]:
        found = repository.references(kind)
        return [{"name": name, "ref": full, "targetCommit": at} for name, full, at in found]

    said: dict[str, Any] = {"branches": listed("heads"), "tags": listed("tags"), "converts": []}
    return json(said | ({"pullRequests": []} if visit.request.asks("include_prs") else {}))


@route("GET", "/api/models/MODEL/commits/(?P<revision>[^/]+)")
def commits(visit: Visit) -> Response:
    found = visit.readable().history(visit.groups["revision"])
    rows = [
        {
            "id": commit["id"],
            "title": commit["title"],
            "message": commit["message"],
            "authors": [{"user": commit["author"]}],
            "date": date(commit["seconds"]),
        }
        for commit in found
    ]
    return json(rows, X_Total_Count=str(len(rows)))


@route("POST DELETE", "/api/models/MODEL/branch/(?P<name>[^/]+)")
def branch(visit: Visit) -> Response:
    repository = visit.writable()
    name = visit.groups["name"]
    if visit.request.method == "POST":
        repository.add_branch(name, visit.request.json().get("startingPoint") or "main")
    elif name == "main":
        raise Refused("the main branch stays")
    else:
        repository.remove("heads", name)
    return json({})


@route("POST DELETE", "/api/models/MODEL/tag/(?P<name>[^/]+)")
def tag(visit: Visit) -> Response:
    """In the path stands what is tagged when a tag is made, and its name when it goes."""
    repository = visit.writable()
    if visit.request.method == "POST":
        asked = visit.request.json()
        repository.add_tag(asked["tag"], visit.groups["name"], asked.get("message"))
    else:
        repository.remove("tags", visit.groups["name"])
    return json({})


def _id(repository: Repository) -> str:
    return hashlib.sha256(repository.id.encode()).hexdigest()[:24]

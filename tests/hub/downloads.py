"""Endpoints that read files: tree, paths-info, resolve, and git's own protocol for clones."""

import mimetypes
import subprocess
from typing import Any
from urllib.parse import parse_qs

from tests.hub.repositories import Entry, NotThere, Repository, git_environment
from tests.hub.routes import State, Visit, date, json, missing, route
from tests.hub.wire import Problem, Request, Response


def _row(repository: Repository, commit: str, entry: Entry, expand: bool) -> dict[str, Any]:
    kind = "directory" if entry.is_folder else "file"
    row: dict[str, Any] = {
        "type": kind,
        "oid": entry.oid,
        "size": entry.content_size,
        "path": entry.path,
    }
    if entry.pointer:
        row["lfs"] = {
            "oid": entry.pointer.oid,
            "size": entry.pointer.size,
            "pointerSize": entry.size,
        }
    if expand:
        last = repository.history(commit, entry.path, most=1)[0]
        row["lastCommit"] = {
            "id": last["id"],
            "title": last["title"],
            "date": date(last["seconds"]),
        }
    return row


@route("GET", "/api/models/MODEL/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def tree(visit: Visit) -> Response:
    repository = visit.readable()
    commit = repository.resolve(visit.groups["revision"])
    folder = visit.groups["folder"].rstrip("/")
    entries = repository.entries(commit)
    if folder and not (folder in entries and entries[folder].is_folder):
        raise missing(NotThere("entry", folder), commit)
    start = f"{folder}/" if folder else ""
    recursive, expand = visit.request.asks("recursive"), visit.request.asks("expand")
    rows = [
        _row(repository, commit, entry, expand)
        for path, entry in entries.items()
        if path.startswith(start) and (recursive or "/" not in path[len(start) :])
    ]
    return json(rows)


@route("POST", "/api/models/MODEL/paths-info/(?P<revision>[^/]+)")
def paths_info(visit: Visit) -> Response:
    """Those that are there; the Python client sends a form, others send JSON."""
    repository = visit.readable()
    commit = repository.resolve(visit.groups["revision"])
    if "json" in visit.request.headers.get("content-type", ""):
        asked = visit.request.json()
        paths, expand = asked["paths"], asked.get("expand", False)
    else:
        form = parse_qs(visit.request.body.decode())
        paths = form.get("paths", [])
        expand = form.get("expand", [""])[0].lower() == "true"
    entries = repository.entries(commit)
    return json(
        [_row(repository, commit, entries[path], expand) for path in paths if path in entries]
    )


@route("GET HEAD", "/MODEL/(?P<how>resolve|raw)/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(visit: Visit) -> Response:
    """A file's bytes; for a large one the way to another host, where the bytes are.

    What a client needs to know of a large file stands on the redirect. It follows none to its own
    host before it looks there, so the storage must be a host of another name.
    """
    repository = visit.open()
    commit = repository.resolve(visit.groups["revision"])
    try:
        entry = repository.entry(commit, visit.groups["path"])
        if entry.is_folder:
            raise NotThere("entry", entry.path)
    except NotThere as error:
        raise missing(error, commit) from error
    headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.oid}"'}
    if entry.pointer and visit.groups["how"] == "resolve":
        headers["Location"] = visit.state.storage_link("GET", repository.id, entry.pointer.oid)
        headers["X-Linked-Size"] = str(entry.pointer.size)
        headers["X-Linked-ETag"] = f'"{entry.pointer.oid}"'
        return Response(302, b"", headers)
    kind = mimetypes.guess_type(entry.path)[0] or "text/plain"
    headers["Content-Type"] = kind
    response = Response(200, repository.blob(entry.oid), headers)
    return response.part(visit.request.headers.get("range"))


def fetch(state: State, request: Request, identity: str, oid: str) -> Response:
    """What the storage service answers to a link that the hub signed."""
    repository = state.repositories.get(identity)
    if repository is None or repository.large_files.size(oid) is None:
        raise Problem(404, "NoSuchKey")
    content = repository.large_files.file(oid).read_bytes()
    headers = {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}
    return Response(200, content, headers).part(request.headers.get("range"))


@route("GET", r"/MODEL(\.git)?/info/refs")
def advertise(visit: Visit) -> Response:
    """What git asks first; it may read, and is sent to the API for writing."""
    visit.challenge = "Basic"
    service = visit.request.query.get("service", [""])[0]
    if service != "git-upload-pack":
        visit.readable()
        raise Problem(403, "this hub takes commits over its API only")
    said = _upload_pack(visit, "--http-backend-info-refs")
    first = f"# service={service}\n"
    body = f"{len(first) + 4:04x}{first}0000".encode() + said
    return Response(200, body, {"Content-Type": f"application/x-{service}-advertisement"})


@route("POST", r"/MODEL(\.git)?/git-upload-pack")
def upload_pack(visit: Visit) -> Response:
    visit.challenge = "Basic"
    kind = {"Content-Type": "application/x-git-upload-pack-result"}
    return Response(200, _upload_pack(visit), kind)


def _upload_pack(visit: Visit, *options: str) -> bytes:
    repository = visit.open()
    done = subprocess.run(
        ["git", "upload-pack", "--stateless-rpc", *options, str(repository.folder)],
        input=visit.request.body,
        capture_output=True,
        check=True,
        env=git_environment() | {"GIT_PROTOCOL": visit.request.headers.get("git-protocol", "")},
    )
    return done.stdout

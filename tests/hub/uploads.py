"""Endpoints that write files: preupload, the LFS batch and its verify, commit."""

import base64
import json as json_text
from typing import Any

from tests.hub import card
from tests.hub.large_files import Pointer, WrongObject
from tests.hub.repositories import LARGEST_REGULAR, Moved, Refused, Repository
from tests.hub.routes import State, Visit, json, route
from tests.hub.wire import Problem, Request, Response

_LFS_JSON = "application/vnd.git-lfs+json"


@route("POST", "/api/models/MODEL/preupload/(?P<revision>[^/]+)")
def preupload(visit: Visit) -> Response:
    """How each file should come, and the id of what is there: the client leaves out equals."""
    repository = visit.writable()
    asked = visit.request.json()
    entries = repository.entries(visit.groups["revision"])
    rows = []
    for file in asked["files"]:
        large = repository.is_large(
            file["path"], file["size"], attributes=asked.get("gitAttributes")
        )
        held = entries.get(file["path"])
        # The object's sha256 for a large file, else git's id of the blob.
        oid = held and (held.pointer.oid if held.pointer else held.oid)
        mode = "lfs" if large else "regular"
        rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json({"files": rows, "commitOid": repository.resolve(visit.groups["revision"])})


@route("POST", r"/MODEL\.git/info/lfs/objects/batch")
def batch(visit: Visit) -> Response:
    asked = visit.request.json()
    upload = asked.get("operation") == "upload"
    repository = visit.writable() if upload else visit.open()
    action = _upload if upload else _download
    rows = [action(visit, repository, wanted["oid"], wanted["size"]) for wanted in asked["objects"]]
    said = {"transfer": "basic", "objects": rows, "hash_algo": "sha256"}
    if upload and any("chunk_size" in _header(row) for row in rows):
        said["transfer"] = "multipart"
    return json(said, Content_Type=_LFS_JSON)


def _header(row: dict[str, Any]) -> dict[str, str]:
    return row.get("actions", {}).get("upload", {}).get("header", {})


def _upload(visit: Visit, repository: Repository, oid: str, size: int) -> dict[str, Any]:
    """Where the object goes; no actions for one that is here already."""
    row = {"oid": oid, "size": size}
    if repository.large_files.size(oid) == size:
        return row
    link = visit.state.storage_link
    verify = f"{visit.state.endpoint}/{repository.id}.git/info/lfs/objects/verify"
    chunk = visit.state.multipart
    if chunk is None or size <= chunk:
        upload = {"href": link("PUT", repository.id, oid), "header": {}}
    else:
        header = {
            f"{number:05}": link("PUT", repository.id, oid, number)
            for number in range(1, -(-size // chunk) + 1)
        }
        upload = {
            "href": link("POST", repository.id, oid),
            "header": {"chunk_size": str(chunk), **header},
        }
    actions = {"upload": upload, "verify": {"href": verify, "header": {}}}
    return row | {"authenticated": True, "actions": actions}


def _download(visit: Visit, repository: Repository, oid: str, size: int) -> dict[str, Any]:
    row = {"oid": oid, "size": size}
    if repository.large_files.size(oid) != size:
        return row | {"error": {"code": 404, "message": "Object does not exist"}}
    href = visit.state.storage_link("GET", repository.id, oid)
    return row | {"authenticated": True, "actions": {"download": {"href": href, "header": {}}}}


@route("POST", r"/MODEL\.git/info/lfs/objects/verify")
def verify(visit: Visit) -> Response:
    repository = visit.writable()
    asked = visit.request.json()
    held = repository.large_files.size(asked["oid"])
    if held is None:
        raise Problem(404, "Object does not exist on the server")
    if held != asked["size"]:
        raise Problem(422, f"the object has {held} bytes, not {asked['size']}")
    return json({}, Content_Type=_LFS_JSON)


def store(state: State, request: Request, identity: str, oid: str, part: int | None) -> Response:
    """What the storage service does with an upload; its answer to a wrong one is S3's."""
    repository = state.repositories.get(identity)
    if repository is None:
        raise Problem(404, "NoSuchBucket")
    try:
        if request.method == "POST":
            parts = request.json()["parts"]
            etags = {item["partNumber"]: item["etag"].strip('"') for item in parts}
            repository.large_files.join(oid, etags)
        elif part is not None:
            etag = repository.large_files.put_part(oid, part, request.body)
            return Response(200, b"", {"ETag": f'"{etag}"'})
        else:
            repository.large_files.put(oid, request.body)
    except WrongObject as error:
        raise Problem(400, f"BadDigest: {error}") from error
    return Response(200, b"", {"ETag": f'"{oid}"'})


@route("POST", "/api/models/MODEL/commit/(?P<branch>[^/]+)")
def commit(visit: Visit) -> Response:
    repository = visit.writable()
    if visit.request.asks("create_pr"):
        raise Refused("this hub has no pull requests")
    branch = visit.groups["branch"]
    header, operations = _operations(visit.request.body)
    changes = _changes(repository, branch, operations)
    message = header.get("summary") or "commit"
    if header.get("description"):
        message += f"\n\n{header['description']}"
    try:
        made = repository.commit(
            changes,
            message,
            author=visit.known().user,
            branch=branch,
            parent=header.get("parentCommit"),
        )
    except Moved as error:
        message = "A commit has happened since. Please refresh and try again."
        raise Problem(412, message) from error
    url = f"{visit.state.endpoint}/{repository.id}/commit/{made}"
    return json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})


def _operations(body: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        lines = [json_text.loads(line) for line in body.splitlines() if line.strip()]
        first, *rest = lines
    except ValueError as error:
        raise Refused(f"the commit is no ndjson with a header: {error}") from error
    if first["key"] != "header":
        raise Refused("the first line of a commit is its header")
    return first["value"], rest


def _changes(
    repository: Repository, branch: str, operations: list[dict[str, Any]]
) -> dict[str, bytes | Pointer | None]:
    held = repository.entries(repository.git_branch(branch))
    changes: dict[str, bytes | Pointer | None] = {}
    for operation in operations:
        key, value = operation["key"], operation["value"]
        path = value["path"].rstrip("/")
        if key == "file":
            changes[path] = _regular(path, value)
        elif key == "lfsFile":
            changes[path] = _large(repository, path, value)
        elif key in ("deletedFile", "deletedFolder"):
            inside = [
                name
                for name, entry in held.items()
                if not entry.is_folder
                and (name == path if key == "deletedFile" else name.startswith(f"{path}/"))
            ]
            if not inside:
                message = f"A file with this name doesn't exist: {path}"
                raise Problem(404, message, "EntryNotFound")
            changes |= dict.fromkeys(inside)
        else:
            raise Refused(f"unknown operation {key}")
    return changes


def _regular(path: str, value: dict[str, Any]) -> bytes:
    content = value["content"].encode()
    if value.get("encoding") == "base64":
        content = base64.b64decode(content, validate=True)
    if len(content) > LARGEST_REGULAR:
        raise Refused(
            f"Your push was rejected because it contains files larger than 10 MiB: {path}"
        )
    if path == "README.md":
        errors, _ = card.judge(content.decode(errors="replace"))
        if errors:
            raise Refused("Invalid metadata in README.md.\n" + "\n".join(errors))
    return content


def _large(repository: Repository, path: str, value: dict[str, Any]) -> Pointer:
    """A pointer to what is here; a client that copies a file does not say its size."""
    size = repository.large_files.size(value["oid"])
    if size is None or value.get("size", size) != size:
        raise Refused(
            "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            f" Offending file: {path}"
        )
    return Pointer(value["oid"], size)

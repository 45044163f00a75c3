"""The model hub: may we write there, put an adapter there, get one from there.

Everything goes through huggingface_hub, which takes the token from ``hf auth login`` or HF_TOKEN
and sends it to the hub alone; nothing here reads, shows or keeps it.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from recipe.sealed import SEAL, damage, whole_folder
from recipe.settings import RunFailed, UserError, is_repo_id
from recipe.sharing.receipt import ADAPTER_CONFIG, RECEIPT
from recipe.sharing.tensors import WEIGHTS
from recipe.sharing.verification import PICKLES

_ATTEMPTS = 5
_LONGEST_WAIT = 60.0
_BUSY = {408, 412, 429, 500, 502, 503, 504}
# A mistyped path must not be asked of the hub.
_LOCAL = ("runs/", "models/", "adapters/", "./", "../", "~/")
# What of a repository is an adapter or says something about it; anything else is not fetched.
_WANTED = (ADAPTER_CONFIG, WEIGHTS, RECEIPT, SEAL, "README.md", "loss.png")

Result = TypeVar("Result")


class HubError(Exception):
    """The hub, or the way there, did not do it. ``status`` is its HTTP status, if it answered."""

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.wait = wait

    @property
    def passing(self) -> bool:
        """Whether trying again can help: no answer, or one that says so."""
        return self.status is None or self.status in _BUSY


@dataclass(frozen=True)
class Published:
    """Where the adapter lies now."""

    repo_id: str
    commit: str
    url: str
    private: bool


def names_repository(name: str) -> bool:
    """Whether ``name`` is meant as a repository ``user/name``: it could be, and is no path here."""
    if name.startswith(_LOCAL) or not is_repo_id(name):
        return False
    return not os.path.exists(name)  # noqa: PTH110


def check_writable(repo_id: str, *, private: bool, where: str) -> None:
    """Token, name and permission, before anything is computed for it. Nothing is written.

    Args:
        where: the key or argument that named the repository, for messages.

    Raises:
        UserError: it could not be published there.
    """
    if get_token() is None:
        raise UserError.single(
            where, "no token for the hub. Run `hf auth login`, or set HF_TOKEN to one that writes."
        )
    api = HfApi()
    try:
        _check_account(_patiently(api.whoami), repo_id, where)
        _check_repository(api, repo_id, private=private, where=where)
    except HubError as error:
        raise UserError.single(where, f"{error}. Nothing was sent.") from error


def _check_account(account: dict[str, Any], repo_id: str, where: str) -> None:
    namespace = repo_id.partition("/")[0]
    names = [account["name"], *(org["name"] for org in account.get("orgs") or [])]
    if namespace not in names:
        raise UserError.single(
            where,
            f"the token is of {account['name']}, who cannot publish as {namespace}. Use "
            f"{' or '.join(f'{name}/…' for name in names[:5])}, or the token of {namespace}.",
        )
    role = {org["name"]: org.get("roleInOrg") for org in account.get("orgs") or []}.get(namespace)
    if role == "read":
        raise UserError.single(
            where,
            f"{account['name']} may only read in {namespace}. Ask its owners, or publish "
            f"as {account['name']}/….",
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError.single(
            where, "the token can only read. Make one that writes in the hub's settings."
        )
    if token.get("role") == "fineGrained" and not _writes(token.get("fineGrained"), repo_id):
        raise UserError.single(
            where,
            f"the token is fine-grained and may not write to {repo_id}. Give it that permission "
            "in the hub's settings.",
        )


def _writes(fine_grained: Any, repo_id: str) -> bool:
    scopes = (fine_grained or {}).get("scoped") or []
    return any(
        "repo.write" in scope.get("permissions", [])
        and (scope.get("entity") or {}).get("name") in (repo_id, repo_id.partition("/")[0])
        for scope in scopes
    )


def _check_repository(api: HfApi, repo_id: str, *, private: bool, where: str) -> None:
    try:
        info = _patiently(lambda: api.model_info(repo_id))
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return  # it will be made
        raise
    _patiently(lambda: api.auth_check(repo_id, write=True))
    if pickles := _pickles(file.rfilename for file in info.siblings or []):
        raise UserError.single(
            where,
            f"{repo_id} holds {', '.join(pickles[:3])}, which can run code when it is read; "
            "nobody would get an adapter from there. Remove it, or name another repository.",
        )
    if private and not info.private:
        raise UserError.single(
            where,
            f"{repo_id} is there already and public, and this adapter is to be private. Name "
            "another repository, or say that it may be public: hub.private: false, or --public.",
        )


def upload(
    folder: Path, repo_id: str, *, private: bool, message: str, say: Callable[[str], None]
) -> Published:
    """Make the repository if need be and commit every file of ``folder`` to it.

    What the hub cannot do now is tried again; large files that it has already are not sent twice.

    Raises:
        HubError: it did not succeed.
    """
    api = HfApi()
    _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True), say)
    hidden = bool(_patiently(lambda: api.model_info(repo_id), say).private)
    commit = _patiently(
        lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message), say
    )
    url = f"{api.endpoint}/{repo_id}"
    # Nothing to commit where the very same files are there: then the newest commit has them.
    return Published(repo_id, commit.oid, url, private=hidden)


def license_of(repo_id: str) -> object:
    """What the card of a model names as its licence; None if it names none.

    Raises:
        HubError: the hub does not say.
    """
    info = _patiently(lambda: HfApi().model_info(repo_id))
    return getattr(info.card_data, "license", None)


def commit_of(repo_id: str, revision: str | None) -> str:
    """The commit that the repository, or its ``revision``, stands at.

    Raises:
        UserError: there is no such repository or revision.
        HubError: the hub does not say.
    """
    try:
        return str(_patiently(lambda: HfApi().model_info(repo_id, revision=revision)).sha)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            named = f"{repo_id} at {revision}" if revision else repo_id
            raise UserError.single(
                "adapter",
                f"there is no folder {repo_id} here, and the hub has no {named} that this token "
                "may read. Correct the name, or `hf auth login`.",
            ) from error
        raise


def download(repo_id: str, destination: Path, *, revision: str | None = None) -> str:
    """Fetch an adapter, compare every file with the hub's own hash of it; return its commit.

    The stock client compares sizes only. A folder that is not whole never appears.

    Raises:
        UserError: no such repository or revision, or no adapter in it, or one with a pickle.
        RunFailed: what arrived is not what the hub says it holds.
        HubError: the hub did not answer.
    """
    api = HfApi()
    files, commit = _listing(api, repo_id, revision)
    with tempfile.TemporaryDirectory(prefix="recipe-download-") as clean:
        arrived = Path(clean) / "adapter"
        arrived.mkdir()
        for name in files:
            path = _patiently(
                partial(api.hf_hub_download, repo_id, name, revision=commit, cache_dir=clean)
            )
            shutil.copyfile(path, arrived / name)
        problems = [
            f"{name} of {repo_id} arrived with another hash than the hub says"
            for name in files
            if not _is_what_the_hub_has(arrived / name, files[name])
        ]
        # The publisher's own seal: somebody may have changed a file on the hub itself.
        if not problems and SEAL in files:
            problems = [line.replace(f"{arrived}/", f"{repo_id}: ") for line in damage(arrived)]
        if problems:
            raise RunFailed(
                "\n".join(f"whole: {line}. Nothing was kept; fetch it again." for line in problems)
            )
        (arrived / SEAL).unlink(missing_ok=True)
        with whole_folder(destination) as staged:
            shutil.copytree(arrived, staged, dirs_exist_ok=True)
    return commit


def _listing(api: HfApi, repo_id: str, revision: str | None) -> tuple[dict[str, RepoFile], str]:
    commit = commit_of(repo_id, revision)
    entries = _patiently(lambda: list(api.list_repo_tree(repo_id, revision=commit, recursive=True)))
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    if pickles := _pickles(files):
        raise UserError.single(
            "adapter",
            f"{repo_id} holds {', '.join(pickles[:3])}, which can run code when it is read, so "
            "nothing of it was fetched. Ask its owner to remove it.",
        )
    if missing := [name for name in (ADAPTER_CONFIG, WEIGHTS) if name not in files]:
        raise UserError.single(
            "adapter", f"{repo_id} is no adapter: it has no {missing[0]}. Correct the name."
        )
    return {name: files[name] for name in _WANTED if name in files}, commit


def _pickles(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if Path(name).suffix.lower() in PICKLES)


def _is_what_the_hub_has(path: Path, entry: RepoFile) -> bool:
    """sha256 for what lies in LFS, git's own hash for the rest."""
    content = path.read_bytes()
    if entry.lfs is not None:
        return hashlib.sha256(content).hexdigest() == entry.lfs.sha256
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == entry.blob_id


def _silent(_: str) -> None:
    pass


def _patiently(call: Callable[[], Result], say: Callable[[str], None] = _silent) -> Result:
    """Again after a pause, as long as that can help."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _asked(call)
        except HubError as error:
            if not error.passing or attempt == _ATTEMPTS:
                raise
            pause = min(error.wait or 2.0 ** (attempt - 1), _LONGEST_WAIT)
            say(f"hub       {error}; trying again in {pause:.0f} s ({attempt} of {_ATTEMPTS - 1})")
            time.sleep(pause)
    raise AssertionError("unreachable")


def _asked(call: Callable[[], Result]) -> Result:
    """What the client raises becomes one line, without addresses, headers or request ids."""
    try:
        return call()
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so the hub is not asked", status=0) from error
    except Exception as error:
        response = getattr(error, "response", None)
        if response is None and not _is_of_the_network(error):
            raise
        status = getattr(response, "status_code", None)
        said = getattr(error, "server_message", None) or _reason(status)
        line = " ".join(str(said).split())[:200].rstrip(".")
        told = f"the hub answered {status} ({line})" if status else "the hub did not answer"
        raise HubError(_without_token(told), status, _retry_after(response)) from error


def _is_of_the_network(error: Exception) -> bool:
    if isinstance(error, ValueError):  # such as a name that no repository can have
        return False
    module = type(error).__module__
    return isinstance(error, ConnectionError | TimeoutError) or module.startswith(
        ("httpx", "httpcore", "huggingface_hub", "requests")
    )


def _reason(status: int | None) -> str:
    reasons = {
        401: "it does not accept the token; it may be mistyped, expired or revoked",
        403: "the token may not do this",
        404: "no such repository",
        409: "a conflict",
        412: "somebody else committed meanwhile",
        429: "too many requests",
    }
    return reasons.get(status or 0, "an error of its own")


def _retry_after(response: Any) -> float | None:
    value = response.headers.get("Retry-After") if response is not None else None
    return float(value) if value and value.isdecimal() else None


def _without_token(text: str) -> str:
    """A server can say anything, also what it was sent."""
    token = get_token()
    return text.replace(token, "…") if token else text

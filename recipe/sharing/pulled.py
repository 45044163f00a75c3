"""Adapters from the hub, each commit once, in the Hugging Face cache."""

import shutil
import sys
from pathlib import Path

from filelock import FileLock

from recipe.data.cache import recipe_cache
from recipe.sealed import damage
from recipe.settings import RunFailed
from recipe.sharing.hub import HubError, commit_of, download

_ADAPTERS = "adapters"


def shown(folder: Path) -> str:
    """An adapter's folder for the screen: one in the cache by its name on the hub."""
    place = recipe_cache() / _ADAPTERS
    if place not in folder.parents:
        return str(folder)
    repository, commit = folder.relative_to(place).parts[:2]
    return f"{repository.replace('--', '/', 1)} at {commit[:12]}"


def adapter_at(repo_id: str, *, revision: str | None = None) -> Path:
    """The folder of ``repo_id``'s adapter; fetched, and compared with the hub's hashes, if need be.

    Which commit is the newest is asked each time. Without an answer, with HF_HUB_OFFLINE for one,
    the commit that was fetched last is used, and that is said.

    Raises:
        UserError: no such repository, or no adapter in it.
        RunFailed: what arrived is not what the hub holds, or it cannot be reached.
    """
    place = recipe_cache() / _ADAPTERS / repo_id.replace("/", "--")
    try:
        commit = commit_of(repo_id, revision)
        folder = place / commit
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):  # another process may want it too
            if not folder.is_dir() or damage(folder):
                shutil.rmtree(folder, ignore_errors=True)
                download(repo_id, folder, revision=commit)
    except OSError as error:  # a full disk, or a cache that cannot be written
        raise RunFailed(f"{repo_id} could not be kept in {place}: {error}") from error
    except HubError as error:
        kept = sorted(place.glob("[!.]*/"), key=lambda one: one.stat().st_mtime_ns)
        if revision is None and kept and (error.status == 0 or error.passing):
            print(f"{repo_id}: {error}. Using {kept[-1].name}, fetched before.", file=sys.stderr)
            return kept[-1]
        raise RunFailed(f"{repo_id} could not be fetched: {error}. Try again later.") from error
    return folder

"""Model repositories as bare git repositories, written by git's own plumbing.

A commit is made as git makes one: blobs, an index, a tree, a commit, and a branch that moves only
if it still is where the commit started. So ``git fsck`` and ``git clone`` judge the result.
"""

import fnmatch
import functools
import hashlib
import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from tests.hub.large_files import LONGEST_POINTER, LargeFiles, Pointer

ATTRIBUTES = "".join(
    f"*.{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in ("safetensors", "bin", "png")
).encode()
# Above this a file is large whatever its name says, and no ordinary commit may carry it.
LARGEST_REGULAR = 10 * 1024 * 1024
_ABSENT = "0" * 40


def git_environment() -> dict[str, str]:
    """In which no setting of the user or the machine has a say, nor an outer GIT_DIR."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    quiet = {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_TERMINAL_PROMPT": "0",
    }
    return kept | quiet | {"LC_ALL": "C"}


class NotThere(Exception):
    """No such revision, or no such file: ``what`` says which."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"{what} {name}")
        self.what = what
        self.name = name


class Moved(Exception):
    """The branch is no longer where the commit wanted to start."""


class Refused(Exception):
    """What was asked for is not possible, for a reason that its message gives."""


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; ``size`` is of the blob, which for a pointer is the pointer."""

    path: str
    is_folder: bool
    oid: str
    size: int
    pointer: Pointer | None = None

    @property
    def content_size(self) -> int:
        return self.pointer.size if self.pointer else self.size


class Repository:
    """``namespace/name`` and its bare git repository, with the large files beside it."""

    def __init__(self, folder: Path, identity: str, *, private: bool, owner: str) -> None:
        self.id = identity
        self.private = private
        self.gated: str | bool = False
        self.folder = folder
        self.large_files = LargeFiles(folder / "lfs")
        self._one_at_a_time = threading.RLock()
        folder.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", "--template=", "--initial-branch=main", str(folder))
        # The real hub begins each repository this way, so that the first upload has a parent.
        self.commit({".gitattributes": ATTRIBUTES}, "initial commit", author=owner, first=True)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def git(self, *arguments: str, given: bytes = b"", **environment: str) -> bytes:
        """Git's stdout."""
        ours = {"GIT_COMMITTER_NAME": "hub", "GIT_COMMITTER_EMAIL": "hub@localhost"}
        done = subprocess.run(
            ["git", f"--git-dir={self.folder}", *arguments],
            input=given,
            capture_output=True,
            env=git_environment() | ours | environment,
        )
        if done.returncode:
            raise Refused(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout

    def resolve(self, revision: str) -> str:
        """The commit of a branch, a tag, HEAD or a full commit id."""
        candidates = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if len(revision) == 40 or revision == "HEAD":
            candidates.append(revision)
        for candidate in candidates:
            try:
                found = self.git("rev-parse", "--verify", "--quiet", candidate + "^{commit}")
            except Refused:
                continue
            return found.decode().strip()
        raise NotThere("revision", revision)

    def entries(self, revision: str) -> dict[str, Entry]:
        """All files and folders of a revision by path, in git's order."""
        return _entries(self, self.resolve(revision))

    def entry(self, revision: str, path: str) -> Entry:
        entry = self.entries(revision).get(path)
        if entry is None:
            raise NotThere("entry", path)
        return entry

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def content(self, entry: Entry) -> bytes:
        if entry.pointer:
            return self.large_files.file(entry.pointer.oid).read_bytes()
        return self.blob(entry.oid)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What somebody who downloads the revision should have, byte for byte."""
        return {
            path: self.content(entry)
            for path, entry in self.entries(revision).items()
            if not entry.is_folder
        }

    def is_large(self, path: str, size: int, *, attributes: str | None = None) -> bool:
        """Whether a file belongs beside git: by main's .gitattributes, or by its size."""
        if attributes is None:
            held = self.entries("main").get(".gitattributes")
            attributes = self.blob(held.oid).decode() if held else ""
        rules = [line.split() for line in attributes.splitlines() if "filter=lfs" in line]
        name = PurePosixPath(path).name
        by_name = any(fnmatch.fnmatchcase(name, rule[0]) for rule in rules)
        return size > LARGEST_REGULAR or (by_name and size > 0)

    def commit(
        self,
        changes: dict[str, bytes | Pointer | None],
        message: str = "commit",
        *,
        author: str = "hub",
        branch: str = "main",
        parent: str | None = None,
        first: bool = False,
    ) -> str:
        """Add or replace each path by its bytes or pointer, delete it with None; the commit's id.

        Bytes that belong beside git are kept there and become a pointer. With ``parent`` the branch
        must still stand there.
        """
        with self._one_at_a_time:
            head = None if first else self.git_branch(branch)
            if parent is not None and parent != head:
                raise Moved(f"{branch} is at {head}, not at {parent}")
            lines = [self._index_line(path, change, first) for path, change in changes.items()]
            with TemporaryDirectory(dir=self.folder) as scratch:
                index = {"GIT_INDEX_FILE": f"{scratch}/index"}
                self.git("read-tree", head or "--empty", **index)
                given = b"".join(lines)
                self.git("update-index", "-z", "--replace", "--index-info", given=given, **index)
                tree = self.git("write-tree", **index).decode().strip()
            commit = self.git(
                *("commit-tree", tree, *(("-p", head) if head else ())),
                given=message.encode() + b"\n",
                GIT_AUTHOR_NAME=author,
                GIT_AUTHOR_EMAIL=f"{author}@localhost",
            )
            made = commit.decode().strip()
            self._move(branch, made, head or _ABSENT)
            return made

    def _index_line(self, path: str, change: bytes | Pointer | None, first: bool) -> bytes:
        parts = PurePosixPath(path).parts
        if not path or "/".join(parts) != path or {"..", ".git", "/"} & set(parts):
            raise Refused(f"{path!r} is no path inside a repository")
        if change is None:
            return f"0 {_ABSENT}\t{path}\0".encode()
        if isinstance(change, bytes) and not first and self.is_large(path, len(change)):
            change = self.keep(change)
        text = change.text() if isinstance(change, Pointer) else change
        blob = self.git("hash-object", "-w", "--stdin", given=text).decode().strip()
        return f"100644 {blob}\t{path}\0".encode()

    def keep(self, content: bytes) -> Pointer:
        """Put ``content`` among the large files."""
        pointer = Pointer(hashlib.sha256(content).hexdigest(), len(content))
        self.large_files.put(pointer.oid, content)
        return pointer

    def git_branch(self, branch: str) -> str:
        """Where a branch stands; a tag or a commit of that name does not do."""
        for name, _, commit in self.references("heads"):
            if name == branch:
                return commit
        raise NotThere("revision", branch)

    def _move(self, branch: str, new: str, old: str) -> None:
        try:
            self.git("update-ref", f"refs/heads/{branch}", new, old)
        except Refused as error:
            raise Moved(str(error)) from error

    def references(self, kind: str) -> list[tuple[str, str, str]]:
        """Name, full name and commit of each of the ``heads`` or ``tags``."""
        # An annotated tag is an object of its own; *objectname is the commit that it names.
        shape = "%(refname:lstrip=2)\t%(refname)\t%(objectname)\t%(*objectname)"
        lines = self.git("for-each-ref", f"--format={shape}", f"refs/{kind}").decode().splitlines()
        rows = [line.split("\t") for line in lines]
        return [(name, full, inner or outer) for name, full, outer, inner in rows]

    def add_branch(self, name: str, revision: str) -> None:
        try:
            self.git("update-ref", f"refs/heads/{name}", self.resolve(revision), _ABSENT)
        except Refused as error:
            raise Moved(f"Reference already exists: {name}") from error

    def add_tag(self, name: str, revision: str, message: str | None = None) -> None:
        if name in [held for held, _, _ in self.references("tags")]:
            raise Moved(f"Tag reference exists already: {name}")
        how = ("-a", "-m", message) if message else ()
        self.git("tag", *how, name, self.resolve(revision))

    def remove(self, kind: str, name: str) -> None:
        if name not in [held for held, _, _ in self.references(kind)]:
            raise NotThere("revision", name)
        self.git("update-ref", "-d", f"refs/{kind}/{name}")

    def history(self, revision: str, *paths: str, most: int = 1000) -> list[dict[str, str]]:
        """The commits of a revision, newest first."""
        shape = "%H%x00%an%x00%at%x00%s%x00%b%x01"
        found = self.git(
            "log", f"-{most}", f"--format={shape}", self.resolve(revision), "--", *paths
        )
        keys = ("id", "author", "seconds", "title", "message")
        rows = [row.strip("\n").split("\0") for row in found.decode().split("\x01")[:-1]]
        return [dict(zip(keys, row, strict=True)) for row in rows]


@functools.lru_cache(maxsize=256)
def _entries(repository: Repository, commit: str) -> dict[str, Entry]:
    """Cached: what a commit holds never changes."""
    found: dict[str, Entry] = {}
    for line in repository.git("ls-tree", "-r", "-t", "-l", "-z", commit).decode().split("\0")[:-1]:
        about, path = line.split("\t", 1)
        _, kind, oid, size = about.split()
        found[path] = Entry(path, kind == "tree", oid, 0 if size == "-" else int(size))
    for path, entry in found.items():
        if not entry.is_folder and 100 < entry.size < LONGEST_POINTER:
            pointer = Pointer.read(repository.blob(entry.oid))
            found[path] = Entry(path, False, entry.oid, entry.size, pointer)
    return found


class Repositories:
    """All repositories of one hub, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: dict[str, Repository] = {}
        self._made = 0

    def create(self, identity: str, *, private: bool = False, owner: str = "hub") -> Repository:
        if identity in self.all:
            raise Moved(f"{identity} exists")
        self._made += 1
        # Numbered, so that a name can be deleted and come back while somebody still reads.
        folder = self.folder / f"{self._made}.git"
        repository = Repository(folder, identity, private=private, owner=owner)
        self.all[identity] = repository
        return repository

    def delete(self, identity: str) -> None:
        shutil.rmtree(self.all.pop(identity).folder)

    def __getitem__(self, identity: str) -> Repository:
        return self.all[identity]

    def get(self, identity: str) -> Repository | None:
        return self.all.get(identity)

    def __contains__(self, identity: str) -> bool:
        return identity in self.all

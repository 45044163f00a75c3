"""The hub against the genuine client: what one puts there, the other brings back."""

import hashlib
import subprocess
from pathlib import Path

import pytest

from tests.hub.repositories import ATTRIBUTES, git_environment
from tests.hub.server import ALICE, BOB, Token

WEIGHTS = bytes(range(256)) * 45_000  # 11.5 MB
CARD = b"---\nlicense: mit\ntags:\n- lora\nbase_model: meta/tiny\n---\n# Words\n"
FILES = {
    "README.md": CARD,
    "adapter_config.json": b'{"r": 4}\n',
    "adapter_model.safetensors": WEIGHTS,
    "deep/er/notes.txt": "Grüße, 世界\n".encode(),
    "empty.bin": b"",
    "figure.png": b"\x89PNG\r\n\x1a\n" + bytes(300),
}
ALL = {".gitattributes": ATTRIBUTES, **FILES}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def bytes_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {".cache", ".git"} & set(path.relative_to(folder).parts)
    }


def test_who_asks(hub, python):
    hub.tokens["hf_fine"] = Token(
        "alice", "fineGrained", (("user", "alice", ("repo.content.read", "repo.write")),)
    )
    said = python("say([api.whoami(token=token) for token in (None, 'hf_alice_reads', 'hf_fine')])")
    assert [who["name"] for who in said] == ["alice"] * 3
    tokens = [who["auth"]["accessToken"] for who in said]
    assert [token["role"] for token in tokens] == ["write", "read", "fineGrained"]
    (scoped,) = tokens[2]["fineGrained"]["scoped"]
    assert scoped["entity"]["name"] == "alice"
    assert scoped["permissions"] == ["repo.content.read", "repo.write"]
    assert [(org["name"], org["roleInOrg"]) for org in said[0]["orgs"]] == [("lab", "admin")]


def test_create_and_delete(hub, python):
    said = python("""
        first = create_repo("alice/one"), create_repo("alone", private=True), create_repo("lab/x")
        again = create_repo("alice/one", exist_ok=True)
        twice = failure(create_repo, "alice/one")
        there = api.repo_exists("alice/one")
        delete_repo("alice/one")
        gone = api.repo_exists("alice/one"), failure(delete_repo, "alice/one")[0]
        delete_repo("alice/one", missing_ok=True)
        say([first, again, twice, there, gone])
    """)
    first, again, twice, there, gone = said
    assert first == [f"{hub.endpoint}/{name}" for name in ("alice/one", "alice/alone", "lab/x")]
    assert again == first[0]
    assert twice[:2] == ["HfHubHTTPError", 409]
    assert there is True
    assert gone == [False, "RepositoryNotFoundError"]
    assert sorted(hub.repositories.all) == ["alice/alone", "lab/x"]
    assert hub.repositories["alice/alone"].private


def test_a_folder_there_and_back(hub, python, folder, tmp_path):
    said = python(
        """
        create_repo("alice/one")
        made = upload_folder(repo_id="alice/one", folder_path=folder, commit_message="All of it")
        snapshot_download("alice/one", local_dir="back")
        cached = snapshot_download("alice/one")
        one = hf_hub_download("alice/one", "deep/er/notes.txt", revision=made.oid)
        say([made.oid, cached, one, api.list_repo_files("alice/one"), made.commit_url])
        """,
        folder=folder,
    )
    oid, cached, one, names, url = said
    assert bytes_below(folder) == FILES
    assert hub.repositories["alice/one"].files() == ALL
    assert bytes_below(tmp_path / "back") == ALL
    assert {name: Path(cached, name).read_bytes() for name in names} == ALL
    assert Path(one).read_bytes() == FILES["deep/er/notes.txt"]
    assert url == f"{hub.endpoint}/alice/one/commit/{oid}"
    # Two large files by their names; an empty one is no large file whatever its name.
    assert len(hub.lines("^PUT", "storage")) == 2
    assert len(hub.lines("/verify$", "hub")) == 2


def test_an_unchanged_folder_makes_no_commit(hub, python, folder):
    said = python(
        """
        create_repo("alice/one")
        first = upload_folder(repo_id="alice/one", folder_path=folder)
        second = upload_folder(repo_id="alice/one", folder_path=folder)
        (Path(folder) / "adapter_config.json").write_text("{}")
        third = upload_folder(repo_id="alice/one", folder_path=folder)
        say([first.oid, second.oid, third.oid])
        """,
        folder=folder,
    )
    assert said[0] == said[1] != said[2]
    assert len(hub.lines("POST /api/models/alice/one/commit/main")) == 2
    assert len(hub.lines("^PUT", "storage")) == 2
    assert len(hub.repositories["alice/one"].history("main")) == 3


def test_model_info(hub, python):
    repository = hub.create("alice/one", FILES)
    said = python("""
        info = api.model_info("alice/one", files_metadata=True)
        plain = api.model_info("alice/one", revision=info.sha)
        rows = {s.rfilename: [s.size, s.blob_id, s.lfs and vars(s.lfs)] for s in info.siblings}
        tree = {f.path: [f.size, f.blob_id, f.lfs and vars(f.lfs)]
                for f in api.list_repo_tree("alice/one", recursive=True, expand=True)
                if isinstance(f, RepoFile)}
        say([info.sha, info.private, info.card_data.to_dict(), info.tags, rows, tree,
             [s.size for s in plain.siblings], info.last_modified.isoformat()])
    """)
    sha, private, card, tags, rows, tree, plain, modified = said
    assert sha == repository.resolve("main")
    assert private is False
    assert card == {"license": "mit", "tags": ["lora"], "base_model": "meta/tiny"}
    assert {"lora", "license:mit", "base_model:meta/tiny"} <= set(tags)
    assert {name: row[0] for name, row in rows.items()} == {n: len(c) for n, c in ALL.items()}
    weights = rows["adapter_model.safetensors"][2]
    assert weights["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert weights["pointer_size"] == len(repository.blob(rows["adapter_model.safetensors"][1]))
    assert tree == rows
    assert plain == [None] * len(ALL)
    assert modified.endswith("+00:00")


def test_parts_of_the_tree(hub, python):
    hub.create("alice/one", FILES)
    said = python("""
        deep = list(api.list_repo_tree("alice/one", "deep", expand=True))
        top = [type(f).__name__ for f in api.list_repo_tree("alice/one")]
        some = api.get_paths_info("alice/one", ["README.md", "deep", "nowhere"])
        say([[f.path for f in deep], deep[0].last_commit.title, top.count("RepoFolder"),
             [f.path for f in some],
             failure(lambda: list(api.list_repo_tree("alice/one", "nowhere")))[0]])
    """)
    assert said == [["deep/er"], "files", 1, ["README.md", "deep"], "RemoteEntryNotFoundError"]


def test_branches_tags_and_history(hub, python):
    hub.create("alice/one", {"a.txt": b"1"})
    said = python("""
        name = "alice/one"
        start = api.model_info(name).sha
        api.create_tag(name, tag="v1")
        api.create_tag(name, tag="v1.1", tag_message="with words")
        api.create_branch(name, branch="feature/x")
        api.create_branch(name, branch="feature/x", exist_ok=True)
        api.create_tag(name, tag="v1", exist_ok=True)
        twice = failure(api.create_branch, name, branch="feature/x")[1]
        up = dict(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=name)
        there = upload_file(**up, revision="feature/x", commit_message="two",
                            commit_description="in words").oid
        refs = api.list_repo_refs(name)
        commits = api.list_repo_commits(name, revision="feature/x")
        texts = [Path(hf_hub_download(name, "a.txt", revision=r)).read_text()
                 for r in ("main", "v1", "v1.1", "feature/x", there)]
        api.delete_branch(name, branch="feature/x")
        api.delete_tag(name, tag="v1")
        after = api.list_repo_refs(name)
        say([start, there, [[b.name, b.target_commit] for b in refs.branches],
             [[t.name, t.target_commit] for t in refs.tags], twice, texts,
             [[c.commit_id, c.title, c.message, c.authors] for c in commits],
             [len(after.branches), len(after.tags)],
             failure(api.delete_tag, name, tag="v1")[0]])
    """)
    start, there, branches, tags, twice, texts, commits, after, gone = said
    assert sorted(branches) == [["feature/x", there], ["main", start]]
    assert tags == [["v1", start], ["v1.1", start]]
    assert twice == 409
    assert texts == ["1", "1", "1", "2", "2"]
    assert [commit[0] for commit in commits][:2] == [there, start]
    assert commits[0][1:] == ["two", "in words", ["alice"]]
    assert commits[-1][1] == "initial commit"
    assert after == [1, 1]
    assert gone == "RevisionNotFoundError"


def test_files_and_folders_are_deleted(hub, python):
    repository = hub.create("alice/one", FILES)
    said = python("""
        delete_file("empty.bin", repo_id="alice/one")
        delete_folder("deep", repo_id="alice/one")
        say([failure(delete_file, "deep", repo_id="alice/one"),
             failure(delete_folder, "deep", repo_id="alice/one")])
    """)
    assert set(repository.files()) == set(ALL) - {"empty.bin", "deep/er/notes.txt"}
    for name, status, text in said:
        assert (name, status) == ("RemoteEntryNotFoundError", 404)
        assert "A file with this name doesn't exist" in text


def test_a_large_file_in_parts(hub, python):
    hub.state.multipart = 5_000_000
    hub.create("alice/one")
    python("""
        Path("w").write_bytes(bytes(range(256)) * 45_000)
        upload_file(path_or_fileobj="w", path_in_repo="w.safetensors", repo_id="alice/one")
    """)
    assert len(hub.lines("^PUT", "storage")) == 3
    assert hub.repositories["alice/one"].files()["w.safetensors"] == WEIGHTS


def test_parts_of_a_file(hub, python):
    """A Range of a small file and of a large one, which the storage serves."""
    hub.create("alice/one", FILES)
    said = python("""
        from huggingface_hub.utils import get_session
        rows = []
        for name in ("README.md", "adapter_model.safetensors"):
            for span in ("bytes=4-6", "bytes=-3", "bytes=99999999-"):
                got = get_session().get(hf_hub_url("alice/one", name), headers={"Range": span})
                rows.append([got.status_code, got.content.hex(), got.headers["Content-Range"]])
        say(rows)
    """)
    for content, rows in ((CARD, said[:3]), (WEIGHTS, said[3:])):
        size = len(content)
        assert rows[0] == [206, content[4:7].hex(), f"bytes 4-6/{size}"]
        assert rows[1] == [206, content[-3:].hex(), f"bytes {size - 3}-{size - 1}/{size}"]
        assert rows[2] == [416, "", f"bytes */{size}"]


def test_no_token_reaches_the_storage(hub, python, folder):
    python(
        """
        create_repo("alice/one", private=True)
        upload_folder(repo_id="alice/one", folder_path=folder)
        snapshot_download("alice/one")
        """,
        folder=folder,
    )
    to_hub = [record for record in hub.requests if record.place == "hub"]
    to_storage = [record for record in hub.requests if record.place == "storage"]
    assert {record.authorization for record in to_hub} == {f"Bearer {ALICE}"}
    assert len(to_storage) == 4
    assert {record.authorization for record in to_storage} == {None}
    assert {record.host for record in to_storage} == {hub.storage.removeprefix("http://")}
    assert not any(ALICE in record.path for record in hub.requests)


def git(*arguments, cwd):
    done = subprocess.run(
        ["git", *arguments], cwd=cwd, capture_output=True, text=True, env=git_environment()
    )
    return done.returncode, done.stdout + done.stderr


def test_git_clones_what_the_client_uploaded(hub, python, folder, tmp_path):
    python(
        """
        create_repo("alice/one", private=True)
        upload_folder(repo_id="alice/one", folder_path=folder)
        delete_file("empty.bin", repo_id="alice/one")
        """,
        folder=folder,
    )
    url = f"{hub.endpoint}/alice/one"
    assert git("clone", "--quiet", url.replace("//", f"//x:{BOB}@"), "no", cwd=tmp_path)[0] != 0
    assert git("clone", "--quiet", url, "no", cwd=tmp_path)[0] != 0
    address = url.replace("//", f"//alice:{ALICE}@")
    assert git("clone", "--quiet", address, "clone", cwd=tmp_path) == (0, "")
    code, said = git("fsck", "--strict", "--full", cwd=tmp_path / "clone")
    assert (code, said.strip()) == (0, "")
    code, said = git("fsck", "--strict", "--full", cwd=hub.repositories["alice/one"].folder)
    assert (code, said.strip()) == (0, "")
    cloned = bytes_below(tmp_path / "clone")
    weights = hashlib.sha256(WEIGHTS).hexdigest()
    # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    assert cloned["adapter_model.safetensors"].decode() == (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights}\nsize {len(WEIGHTS)}\n"
    )
    large = {"adapter_model.safetensors", "figure.png"}
    expected = {name: text for name, text in ALL.items() if name not in large | {"empty.bin"}}
    assert {name: text for name, text in cloned.items() if name not in large} == expected
    assert git("log", "--format=%an", cwd=tmp_path / "clone")[1].split() == ["alice"] * 3
    (tmp_path / "clone/new.txt").write_text("x")
    git("add", "new.txt", cwd=tmp_path / "clone")
    assert git("push", "--quiet", address, "main", cwd=tmp_path / "clone")[0] != 0

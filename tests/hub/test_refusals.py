"""Whom the hub refuses what, and that the genuine client understands why."""

import hashlib
import urllib.error
import urllib.request

import pytest

from tests.hub import card
from tests.hub.server import ALICE, ALICE_READS, BOB, Token

NO_REPOSITORY = "RepositoryNotFoundError"
FOREIGN = "hf_not_known"


def test_a_stale_parent_is_refused(hub, python):
    repository = hub.create("alice/one", {"a.txt": b"1"})
    said = python("""
        old = api.model_info("alice/one").sha
        add = [CommitOperationAdd("b.txt", b"2")]
        new = create_commit("alice/one", add, commit_message="x", parent_commit=old).oid
        add = [CommitOperationAdd("c.txt", b"3")]
        say([new, failure(create_commit, "alice/one", add, commit_message="x", parent_commit=old)])
    """)
    new, (name, status, text) = said
    assert (name, status) == ("HfHubHTTPError", 412)
    assert "A commit has happened since" in text
    assert repository.resolve("main") == new
    assert set(repository.files()) == {".gitattributes", "a.txt", "b.txt"}


def test_a_reading_token_writes_nothing(hub, python):
    repository = hub.create("alice/one", {"a.txt": b"1"})
    said = python(
        """
        up = dict(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="alice/one")
        say([failure(create_repo, "alice/two"), failure(upload_file, **up),
             failure(delete_repo, "alice/one"),
             failure(api.update_repo_settings, "alice/one", private=True),
             failure(api.create_tag, "alice/one", tag="v1"),
             failure(api.auth_check, "alice/one", write=True),
             failure(api.auth_check, "alice/one")])
        """,
        token=ALICE_READS,
    )
    assert [error[:2] for error in said[:-1]] == [["HfHubHTTPError", 403]] * 6
    assert "write token" in said[1][2]
    assert said[-1] is None
    assert list(hub.repositories.all) == ["alice/one"]
    assert len(repository.history("main")) == 2


def test_an_unknown_token_is_refused_everywhere(hub, python):
    hub.create("alice/one", {"a.txt": b"1"})
    said = python(
        """
        say([failure(api.whoami), failure(create_repo, "alice/two"),
             failure(api.model_info, "alice/one"),
             failure(snapshot_download, "alice/one"),
             failure(upload_file, path_or_fileobj=b"2", path_in_repo="b", repo_id="alice/one")])
        """,
        token=FOREIGN,
    )
    assert [error[1] for error in said] == [401] * 5
    assert "Invalid user token" in said[0][2]
    assert all("Invalid credentials in Authorization header" in said[n][2] for n in range(1, 5))


@pytest.mark.parametrize("token", [ALICE, None])
def test_what_is_not_there(hub, python, token):
    hub.create("alice/one", {"a.txt": b"1"})
    said = python(
        """
        say([failure(api.model_info, "alice/none"),
             failure(hf_hub_download, "alice/none", "a.txt"),
             failure(api.model_info, "alice/one", revision="v9"),
             failure(hf_hub_download, "alice/one", "a.txt", revision="v9"),
             failure(hf_hub_download, "alice/one", "b.txt"),
             failure(api.list_repo_commits, "alice/one", revision="v9"),
             api.file_exists("alice/one", "a.txt"), api.file_exists("alice/one", "b.txt")])
        """,
        token=token,
    )
    # Who shows no token is not told whether it is missing or private.
    status = 401 if token is None else 404
    assert [error[:2] for error in said[:6]] == [
        [NO_REPOSITORY, status],
        [NO_REPOSITORY, status],
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
    ]
    assert said[6:] == [True, False]


@pytest.mark.parametrize("token", [BOB, None])
def test_a_private_repository_is_not_there_for_others(hub, python, token):
    hub.create("alice/one", {"a.txt": b"1", "w.safetensors": b"w"}, private=True)
    said = python(
        """
        say([failure(api.model_info, "alice/one"), failure(api.auth_check, "alice/one"),
             failure(hf_hub_download, "alice/one", "a.txt"),
             failure(hf_hub_download, "alice/one", "w.safetensors"),
             failure(lambda: list(api.list_repo_tree("alice/one"))),
             failure(api.list_repo_refs, "alice/one"), failure(api.list_repo_commits, "alice/one"),
             failure(delete_repo, "alice/one")])
        """,
        token=token,
    )
    assert [error[0] for error in said] == [NO_REPOSITORY] * 8
    assert "alice/one" in hub.repositories
    assert not hub.lines(place="storage")
    assert python("say(api.model_info('alice/one').private)", token=ALICE_READS) is True


def test_visibility_changes(hub, python):
    hub.create("alice/one", {"a.txt": b"1"})
    python("api.update_repo_settings('alice/one', private=True)")
    assert python("say(api.repo_exists('alice/one'))", token=BOB) is False
    python("api.update_repo_settings('alice/one', visibility='public')")
    assert python("say(api.repo_exists('alice/one'))", token=BOB) is True


def test_a_gated_repository_shows_its_files_to_nobody_else(hub, python):
    hub.create("alice/one", {"a.txt": b"1"})
    python("api.update_repo_settings('alice/one', gated='manual')")
    said = python(
        """
        say([api.model_info("alice/one").gated, failure(hf_hub_download, "alice/one", "a.txt")])
        """,
        token=BOB,
    )
    assert said[0] == "manual"
    assert said[1][:2] == ["GatedRepoError", 403]
    assert python("hf_hub_download('alice/one', 'a.txt'); say(True)") is True


def test_what_is_anothers_is_read_alone(hub, python):
    hub.create("alice/one", {"a.txt": b"1"})
    hub.create("lab/x", private=True)
    said = python(
        """
        up = dict(path_or_fileobj=b"2", path_in_repo="b.txt")
        say([failure(create_repo, "alice/two"), failure(create_repo, "lab/y"),
             failure(create_repo, "alice/one", exist_ok=True),
             failure(upload_file, repo_id="alice/one", **up),
             failure(upload_file, repo_id="lab/x", **up),
             Path(hf_hub_download("alice/one", "a.txt")).read_text(),
             api.model_info("lab/x").private])
        """,
        token=BOB,
    )
    assert [error and error[1] for error in said[:5]] == [403, 403, None, 403, 403]
    assert 'under the namespace "alice"' in said[0][2]
    assert said[5:] == ["1", True]


def test_a_fine_grained_token_does_what_it_lists(hub, python):
    hub.create("alice/one", private=True)
    hub.create("alice/two", private=True)
    permissions = (("model", "alice/one", ("repo.content.read", "repo.write")),)
    hub.tokens["hf_fine"] = Token("alice", "fineGrained", permissions)
    said = python(
        """
        up = dict(path_or_fileobj=b"2", path_in_repo="b.txt")
        upload_file(repo_id="alice/one", **up)
        say([failure(upload_file, repo_id="alice/two", **up), failure(create_repo, "alice/three")])
        """,
        token="hf_fine",
    )
    assert said[0][0] == NO_REPOSITORY
    assert said[1][:2] == ["HfHubHTTPError", 403]


@pytest.mark.parametrize(
    ("readme", "words"),
    [
        ("---\nlicense: [\n---\n", "flow"),
        ("---\nlicense: mine alone\n---\n", '"license" must be one of'),
        ("---\nbase_model: /models/tiny\n---\n", '"base_model" with value "/models/tiny"'),
        ("---\ntags: [1]\n---\n", '"tags" must be an array of strings'),
        ("---\n- a list\n---\n", "must be a mapping"),
    ],
)
def test_a_readme_with_wrong_metadata_is_refused(hub, python, readme, words):
    """By validate-yaml before anything is sent, and by the commit of a client that did not ask."""
    repository = hub.create("alice/one")
    said = python(
        """
        from huggingface_hub.utils import get_session
        import base64
        up = dict(path_in_repo="README.md", path_or_fileobj=readme.encode(), repo_id="alice/one")
        value = {"path": "README.md", "content": base64.b64encode(readme.encode()).decode(),
                 "encoding": "base64"}
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "file", "value": value}]
        answer = get_session().post(
            f"{api.endpoint}/api/models/alice/one/commit/main",
            content="\\n".join(map(json.dumps, lines)),
            headers=api._build_hf_headers())
        say([failure(upload_file, **up), answer.status_code, answer.json()["error"]])
        """,
        readme=readme,
    )
    (name, _, text), status, error = said
    assert name == "ValueError"
    assert "Invalid metadata in README.md" in text
    assert words in text
    assert status == 400
    assert words in error
    assert len(repository.history("main")) == 1


def test_a_readme_without_metadata_is_a_warning(hub, client, tmp_path):
    hub.create("alice/one")
    file = tmp_path / "up.py"
    file.write_text(
        "from huggingface_hub import upload_file\n"
        "upload_file(path_or_fileobj=b'# x', path_in_repo='README.md', repo_id='alice/one')\n"
    )
    answer = client.run(file, token=ALICE)
    assert answer.code == 0
    assert "empty or missing yaml metadata in repo card" in answer.err
    assert hub.repositories["alice/one"].files()["README.md"] == b"# x"


def test_front_matter():
    assert card.metadata("# only words") is None
    assert card.metadata("---\na: 1\n---") == {"a": 1}
    assert card.metadata("---\r\na: 1\r\n---\r\nwords\r\n---\r\n") == {"a": 1}
    assert card.metadata("---\n---\nwords") is None
    assert card.metadata("words\n---\na: 1\n---\n") is None


def test_an_object_that_is_not_what_its_name_says_is_refused(hub, python):
    """The client announces one sha256 and sends other bytes, as where a file changes meanwhile."""
    repository = hub.create("alice/one")
    said = python("""
        add = CommitOperationAdd("w.safetensors", b"w" * 1000)
        add.upload_info.sha256 = bytes(32)
        say(failure(create_commit, "alice/one", [add], commit_message="x"))
    """)
    assert said[0] == "RuntimeError"
    assert "Error while uploading 'w.safetensors'" in said[2]
    put = [record.status for record in hub.requests if record.method == "PUT"]
    assert put == [400]
    assert repository.large_files.size("0" * 64) is None
    assert len(repository.history("main")) == 1


def test_a_pointer_to_nothing_is_no_commit(hub, python):
    repository = hub.create("alice/one")
    oid = hashlib.sha256(b"w").hexdigest()
    said = python(
        """
        from huggingface_hub.utils import get_session
        def commit(*lines):
            lines = [{"key": "header", "value": {"summary": "x"}}, *lines]
            url = f"{api.endpoint}/api/models/alice/one/commit/main"
            body = "\\n".join(map(json.dumps, lines))
            return get_session().post(url, content=body, headers=api._build_hf_headers())
        def file(path):
            return {"key": "file", "value": {"path": path, "content": "x"}}
        missing = {"key": "lfsFile", "value": {"path": "w.bin", "oid": oid, "size": 1}}
        bad = [commit(missing), commit(file("../up")), commit(file("/abs")), commit(file(".git/x"))]
        say([[answer.status_code, answer.json()["error"]] for answer in bad])
        """,
        oid=oid,
    )
    assert [status for status, _ in said] == [400] * 4
    assert "LFS pointer pointed to a file that does not exist" in said[0][1]
    assert len(repository.history("main")) == 1


def test_a_link_to_the_storage_is_for_one_object_and_one_method(hub):
    hub.create("alice/one", {"w.safetensors": b"w", "v.safetensors": b"v"}, private=True)
    w, v = (hashlib.sha256(text).hexdigest() for text in (b"w", b"v"))
    link = hub.link("GET", "alice/one", w)
    with urllib.request.urlopen(link) as answer:
        assert answer.read() == b"w"
    wrong = [
        urllib.request.Request(link.replace(w, v)),
        urllib.request.Request(link.partition("?")[0]),
        urllib.request.Request(link, data=b"x", method="PUT"),
    ]
    for request in wrong:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request)

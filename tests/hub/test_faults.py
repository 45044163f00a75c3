"""Each fault that a test can ask for, as the genuine client meets it."""

import hashlib
import http.client
from urllib.parse import urlsplit

import pytest

from tests.hub.faults import Fault, Faults
from tests.hub.server import ALICE

WEIGHTS = bytes(range(256)) * 4_000  # 1 MB
COMMIT = "POST /api/models/alice/one/commit"
UPLOAD = (
    'say(failure(upload_file, path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="alice/one"))'
)
DOWNLOAD = """
    file = hf_hub_download("alice/one", "w.safetensors")
    say(Path(file).read_bytes().hex())
"""


def statuses(hub, match):
    return [record.status for record in hub.requests if match in record.line]


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500, 503])
def test_a_commit_answered_by_an_error(hub, python, status):
    repository = hub.create("alice/one")
    hub.faults.add(Fault(COMMIT, status=status, error="not today"))
    name, seen, text = python(UPLOAD)
    assert (name, seen) == ("HfHubHTTPError", status)
    assert "not today" in text
    assert len(repository.history("main")) == 1
    assert python(UPLOAD) is None
    assert len(repository.history("main")) == 2


def test_an_error_code_makes_the_clients_class(hub, python):
    hub.create("alice/one")
    hub.faults.add(Fault("GET /api/models", status=404, code="RevisionNotFound"))
    said = python(
        'say([failure(api.model_info, "alice/one"), failure(api.model_info, "alice/one")])'
    )
    assert said[0][0] == "RevisionNotFoundError"
    assert said[1] is None


def test_a_rate_limit_is_waited_for(hub, client, tmp_path):
    repository = hub.create("alice/one")
    hub.faults.add(Fault("/preupload/", status=429, retry_after=0))
    file = tmp_path / "up.py"
    file.write_text(
        "import logging\n"
        "from huggingface_hub import upload_file\n"
        # The recipe's commands, which run in this process too, keep it quiet.
        "logging.getLogger('huggingface_hub').setLevel(logging.WARNING)\n"
        "upload_file(path_or_fileobj=b'2', path_in_repo='b.txt', repo_id='alice/one')\n"
    )
    answer = client.run(file, token=ALICE)
    assert answer.code == 0
    assert "Rate limited. Waiting 1.0s before retry" in answer.err
    assert statuses(hub, "/preupload/") == [429, 200]
    assert repository.files()["b.txt"] == b"2"


def test_a_server_error_is_tried_again(hub, python):
    hub.create("alice/one", {"w.safetensors": WEIGHTS})
    hub.faults.add(Fault("/preupload/", status=503))
    assert python(UPLOAD) is None
    assert statuses(hub, "/preupload/") == [503, 200]


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, python):
    """The client keeps whole pieces of 10 MB and asks for the rest."""
    weights = bytes(range(256)) * 45_000
    hub.create("alice/one", {"w.safetensors": weights})
    hub.faults.add(Fault(r"GET /alice/one/\w{64}", cut=11_000_000))
    assert bytes.fromhex(python(DOWNLOAD)) == weights
    assert [record.status for record in hub.requests if record.place == "storage"] == [200, 206]


def test_an_answer_that_is_cut(hub, python):
    hub.create("alice/one")
    hub.faults.add(Fault("GET /api/models/alice/one", cut=10))
    name, _, text = python('say(failure(api.model_info, "alice/one"))')
    assert name == "RemoteProtocolError"
    assert "incomplete" in text or "without sending complete" in text


def test_the_answer_to_a_commit_that_was_made_is_lost(hub, python):
    repository = hub.create("alice/one")
    hub.faults.add(Fault(COMMIT, cut=0))
    assert python(UPLOAD)[0] == "RemoteProtocolError"
    assert repository.files()["b.txt"] == b"2"


@pytest.mark.parametrize("cut", [0, 300_000])
def test_an_upload_that_is_cut_is_sent_again(hub, python, cut):
    repository = hub.create("alice/one")
    hub.faults.add(Fault("^PUT", cut_upload=cut))
    python("""
        upload_file(path_or_fileobj=bytes(range(256)) * 4_000, path_in_repo="w.safetensors",
                    repo_id="alice/one")
    """)
    assert repository.files()["w.safetensors"] == WEIGHTS
    assert statuses(hub, "PUT") == [0, 200]


def test_no_answer_at_all(hub, python):
    hub.create("alice/one")
    hub.faults.add(Fault("GET /api/models/alice/one", cut_upload=0))
    name, _, text = python('say(failure(api.model_info, "alice/one"))')
    assert name in ("RemoteProtocolError", "ReadError"), text


def test_one_wrong_bit_goes_unnoticed_by_the_client(hub, python):
    """Which is why it is worth a test of whoever says that a download is what was uploaded."""
    repository = hub.create("alice/one", {"w.safetensors": WEIGHTS})
    hub.faults.add(Fault(r"GET /alice/one/\w{64}", corrupt=True))
    got = bytes.fromhex(python(DOWNLOAD))
    assert len(got) == len(WEIGHTS)
    (where,) = [place for place in range(len(got)) if got[place] != WEIGHTS[place]]
    assert (got[where] ^ WEIGHTS[where]).bit_count() == 1
    assert repository.files()["w.safetensors"] == WEIGHTS


def test_a_hub_that_is_too_slow_is_asked_again(hub, python):
    """After the 3 seconds that the client's process waits."""
    hub.create("alice/one", {"w.safetensors": WEIGHTS})
    hub.faults.add(Fault("HEAD .*/resolve/", delay=4))
    assert bytes.fromhex(python(DOWNLOAD)) == WEIGHTS
    assert len(hub.lines("HEAD .*/resolve/")) == 2


def test_somebody_else_is_faster(hub, python):
    repository = hub.create("alice/one")
    hub.faults.add(Fault(COMMIT, first=lambda: repository.commit({"theirs.txt": b"1"})))
    said = python("""
        sha = api.model_info("alice/one").sha
        add = [CommitOperationAdd("ours.txt", b"2")]
        say(failure(create_commit, "alice/one", add, commit_message="x", parent_commit=sha))
    """)
    assert said[1] == 412
    assert set(repository.files()) == {".gitattributes", "theirs.txt"}


def test_faults_pass_the_first_and_take_so_many():
    faults = Faults()
    faults.add(Fault("GET /a", after=1, times=2, status=500), Fault("/b$", times=None, status=404))
    seen = [faults.pick(line) for line in ["GET /a"] * 5 + ["PUT /a", "GET /b"] + ["PUT /b"] * 3]
    assert [fault and fault.status for fault in seen] == [
        *(None, 500, 500, None, None),
        *(None, 404),
        *(404, 404, 404),
    ]


def test_a_body_in_chunks(hub):
    """As a client sends what it does not know the length of."""
    repository = hub.create("alice/one")
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    link = urlsplit(hub.link("PUT", "alice/one", oid))
    connection = http.client.HTTPConnection("localhost", link.port)
    parts = (WEIGHTS[start : start + 70_000] for start in range(0, len(WEIGHTS), 70_000))
    connection.request("PUT", f"{link.path}?{link.query}", body=parts, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert repository.large_files.size(oid) == len(WEIGHTS)

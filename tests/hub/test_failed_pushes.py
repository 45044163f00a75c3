"""What a user sees when the hub, or the way there, fails: told, waited for, and nothing lost."""

import pytest

from tests.hub.faults import Fault
from tests.hub.publishing import TUNED


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST /api/models/alice/tuned/commit", status=500),
        Fault("POST /api/models/alice/tuned/commit", status=412, times=2),
        Fault("POST /api/repos/create", status=503),
        Fault("POST /api/models/alice/tuned/preupload", status=429, retry_after=1),
        Fault("PUT /", cut_upload=100),
        Fault("POST /api/models/alice/tuned/commit", cut=0),
        Fault("GET /.*safetensors|GET /alice/tuned/[0-9a-f]{64}", cut=1000),
    ],
    ids=["500", "two 412", "503", "429", "upload cut", "answer cut", "download cut"],
)
def test_what_passes_is_waited_for(user, trained, hub, fault):
    hub.faults.add(fault)
    answer = user.adapter("push", TUNED)
    assert fault.hits, hub.lines()
    assert answer.code == 0, answer.err
    assert "verified  6 files fetched again" in answer.out
    assert answer.out.count("licence ") == 1


# A 409 to the first means that the repository is there, which is fine.
CREATE, COMMIT = "POST /api/repos/create", "POST /api/models/alice/tuned/commit"


@pytest.mark.parametrize(
    ("at", "status"), [(CREATE, 401), (CREATE, 403), (COMMIT, 401), (COMMIT, 403), (COMMIT, 409)]
)
def test_what_does_not_pass_is_told_at_once(user, trained, hub, at, status):
    fault = Fault(at, status=status, times=None)
    hub.faults.add(fault)
    answer = user.adapter("push", TUNED)
    assert answer.code == 3
    (line,) = answer.err.strip().splitlines()
    said = f"not published: the hub answered {status} (a fault of the test)."
    assert line.startswith(f"{said} The adapter is as it was; to finish: python recipe/adapter.py")
    assert "trying again" not in answer.out
    assert fault.hits == 1


def test_a_push_that_fails_leaves_the_run_a_success_and_says_how_to_finish(user, hub):
    hub.faults.add(Fault("POST /api/models/alice/tuned/commit", status=403, times=None))
    answer = user.train(hub={"push": True, "repo_id": TUNED, "license": "mit"})
    assert answer.code == 0, answer.err
    assert "warning   not published: the hub answered 403" in answer.out
    command = answer.out.partition("to finish: ")[2].strip().splitlines()[0]
    assert command.startswith("python recipe/adapter.py push alice/tuned --adapter runs/tiny-001")
    assert user.adapter("verify").code == 0
    again = user.adapter(*command.split()[2:])
    assert again.code == 3
    assert "the hub answered 403" in again.err
    assert command in again.err
    hub.faults.clear()
    assert user.adapter(*command.split()[2:]).code == 0


def test_an_object_that_changed_on_the_way_is_not_kept(user, trained, hub):
    assert user.adapter("push", TUNED).code == 0
    hub.faults.add(Fault(r"GET /alice/tuned/[0-9a-f]{64}", corrupt=True))
    answer = user.adapter("pull", TUNED, "--output", "mine")
    assert answer.code == 3
    assert "adapter_model.safetensors of alice/tuned arrived with another hash" in answer.err
    assert not (user.folder / "mine").exists()
    assert user.adapter("pull", TUNED, "--output", "mine").code == 0


def test_what_comes_back_damaged_after_a_push_is_told(user, trained, hub):
    hub.faults.add(Fault(r"GET /alice/tuned/[0-9a-f]{64}", corrupt=True))
    answer = user.adapter("push", TUNED)
    assert answer.code == 3
    assert "published, but what came back is not sound: whole: adapter_model" in answer.err
    assert "arrived with another hash" in answer.err
    assert "to finish: python recipe/adapter.py push alice/tuned" in answer.err


def test_a_hub_that_does_not_answer(user, trained, hub):
    assert user.adapter("push", TUNED).code == 0
    assert (
        user.command("generate", "--adapter", TUNED, "--prompt", "a", "max_new_tokens=4").code == 0
    )
    hub.faults.add(
        Fault("GET /api/models/alice/tuned", status=404, code="RepoNotFound", times=None)
    )
    answer = user.command("generate", "--adapter", TUNED, "--prompt", "a", "max_new_tokens=4")
    assert answer.code == 2
    hub.faults.clear()
    hub.faults.add(Fault("GET /api/models/alice/tuned", status=503, times=None))
    answer = user.command("generate", "--adapter", TUNED, "--prompt", "a", "max_new_tokens=4")
    assert answer.code == 0
    assert "fetched before" in answer.err

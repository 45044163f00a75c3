"""One hub and one client for the session: the client reads the hub's address once."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.hub.client import Client
from tests.hub.publishing import User
from tests.hub.server import ALICE, Hub

_PRELUDE = """
import json
from pathlib import *
import huggingface_hub
from huggingface_hub import *

api = HfApi()

def say(value):
    print(json.dumps(value, default=str))

def failure(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status, str(error)]
"""


@pytest.fixture(scope="session")
def _running_hub() -> Iterator[Hub]:
    if shutil.which("git") is None:
        pytest.skip("the hub keeps its repositories in git, which is not installed")
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def client(_running_hub: Hub) -> Iterator[Client]:
    """The client's process, started by its first call."""
    client = Client(_running_hub.endpoint)
    yield client
    client.close()


@pytest.fixture
def hub(_running_hub: Hub, client: Client) -> Iterator[Hub]:
    """An empty hub, and a client that has nothing in its cache."""
    client.ready()
    client.forget()
    _running_hub.reset()
    yield _running_hub
    assert not _running_hub.book.crashes, "\n".join(_running_hub.book.crashes)


@pytest.fixture
def python(hub: Hub, client: Client, tmp_path: Path) -> Callable[..., Any]:
    """Run lines of Python in the client's process; what they ``say`` last is returned.

    They find ``api``, all of huggingface_hub, ``failure(call, ...)``, which is the error of a call
    as name, status and text, and each named argument as a variable.
    """

    def run(code: str, *, token: str | None = ALICE, **values: Any) -> Any:
        given = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        file = tmp_path / "snippet.py"
        file.write_text(_PRELUDE + given + dedent(code))
        answer = client.run(file, token=token, cwd=tmp_path)
        assert answer.code == 0, answer.err
        return json.loads(answer.out.splitlines()[-1]) if answer.out else None

    return run


@pytest.fixture
def user(hub, client, tmp_path, tiny_checkpoint, write_config):
    folder = tmp_path / "home"
    folder.mkdir()
    user = User(hub, client, folder, write_config)
    user.upload_base(tiny_checkpoint)
    return user


@pytest.fixture
def trained(user):
    answer = user.train()
    assert answer.code == 0, answer.err
    return user.run / "adapter"

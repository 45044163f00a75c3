"""A second, independent client of the same protocol: the one that Hugging Face writes for Node."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hub.server import ALICE

INSTALL = "npm install --prefix build/npm @huggingface/hub@2.17.5"
BUILT = Path(__file__).parents[2] / "build/npm/node_modules"
MODULES = Path(os.environ.get("RECIPE_NODE_MODULES") or BUILT)
ENTRY = MODULES / "@huggingface/hub/dist/index.mjs"


@pytest.fixture
def node():
    found = shutil.which("node")
    if found is None or not ENTRY.is_file():
        pytest.skip(f"node and @huggingface/hub are not there: {INSTALL}")
    return found


def test_node_and_python_meet(hub, client, python, node):
    """Node uploads beside a file that Python has uploaded, and reads both."""
    text = bytes(range(256)) * 100
    python(
        """
        create_repo("alice/node", private=True)
        upload_file(path_or_fileobj=text, path_in_repo="from_python.safetensors",
                    repo_id="alice/node")
        """,
        text=text,
    )
    done = subprocess.run(
        [node, Path(__file__).with_name("npm_client.mjs"), ENTRY, hub.endpoint, ALICE],
        env=client.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    repository = hub.repositories["alice/node"]
    files = repository.files()
    assert (said["who"], said["role"]) == ("alice", "write")
    assert said["made"] == f"{hub.endpoint}/alice/second"
    assert said["again"] == 409
    assert said["info"] == ["alice/node", True]
    assert repository.private
    assert said["commits"] == [commit["title"] for commit in repository.history("main")]
    assert {entry["path"]: entry["size"] for entry in said["listed"]} == {
        name: len(content) for name, content in files.items()
    }
    assert files["w.safetensors"] == bytes([7]) * 1_000_000
    assert said["downloaded"] == {
        name: hashlib.sha256(files[name]).hexdigest()
        for name in ("README.md", "w.safetensors", "from_python.safetensors")
    }
    assert said["large"] == [1_000_000, f'"{said["weights"]}"']
    assert (said["stale"], said["stranger"]) == (412, 404)
    assert not any(record.authorization for record in hub.requests if record.place == "storage")
    back = python("say(Path(hf_hub_download('alice/node', 'w.safetensors')).read_bytes().hex())")
    assert bytes.fromhex(back) == files["w.safetensors"]

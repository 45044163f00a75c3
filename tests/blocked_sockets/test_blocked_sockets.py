"""The suite cannot reach a network, neither here nor in the processes it starts."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

# RFC 5737 and 3849: addresses for documentation, which nobody has.
ELSEWHERE = ("192.0.2.1", 9)
ELSEWHERE_6 = ("2001:db8::1", 9)
MESSAGE = "the tests use no network"


def send(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.sendto(b"x", address)


def connect_ex(address):
    with socket.socket() as connection:
        connection.settimeout(1)
        connection.connect_ex(address)


@pytest.mark.parametrize(
    "call",
    [
        lambda: socket.create_connection(ELSEWHERE, timeout=1),
        lambda: socket.create_connection(ELSEWHERE_6, timeout=1),
        lambda: connect_ex(ELSEWHERE),
        lambda: send(ELSEWHERE),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: socket.gethostbyname("huggingface.co"),
        lambda: socket.gethostbyaddr("192.0.2.1"),
    ],
)
def test_nothing_elsewhere_is_called(call):
    with pytest.raises(RuntimeError, match=MESSAGE):
        call()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_works(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answering = threading.Thread(target=lambda: server.accept()[0].sendall(b"here"))
        answering.start()
        with socket.create_connection((host, port), timeout=5) as connection:
            assert connection.recv(4) == b"here"
        answering.join()


def test_sockets_of_the_machine_work():
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"x")
        assert right.recv(1) == b"x"


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_process_that_a_test_starts_is_blocked_too():
    result = python(f"import socket; socket.create_connection({ELSEWHERE}, timeout=1)")
    assert result.returncode == 1
    assert MESSAGE in result.stderr
    assert python("import os; print(os.environ['HF_HUB_OFFLINE'])").stdout == "1\n"


def test_a_sitecustomize_of_the_machine_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    both = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
    result = python(f"import socket; socket.create_connection({ELSEWHERE})", PYTHONPATH=both)
    assert result.stdout == "theirs\n"
    assert MESSAGE in result.stderr


def test_ours_is_the_first_that_python_finds():
    first = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    assert first == Path(__file__).parent

"""The live page in a real Chromium, served by a process of its own.

`apt-get install chromium` and `pip install -e .[demo,browser]` make these run.
"""

import http.client
import importlib.util
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from tests.commands.test_live import (  # noqa: F401
    adapter,
    another,
    generated,
    load,
    until,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not there: pip install -e .[browser]"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("gradio"), reason="no gradio: pip install -e .[demo]"
    ),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium"),
]
STEP = 0.03  # seconds that each forward pass takes at least, so that there is something to see
# Writes down each of the model's forward passes, and each address that the tests would block.
SERVER = """
import sys, time
from pathlib import Path
import sitecustomize

adapter, model, host, port, passes, elsewhere, step = sys.argv[1:8]
is_here = sitecustomize._is_here

def noticed(host):
    here = is_here(host)
    if not here:
        with open(elsewhere, "a") as file:
            print(host, file=file)
    return here

sitecustomize._is_here = noticed

from recipe.exit_codes import run_command
from recipe.quiet import quiet_libraries

quiet_libraries()
from recipe.answerer import load_answerer
from recipe.live import serve
from recipe.settings import generation_keys, generation_settings

def slow(*_):
    with open(passes, "ab") as file:
        file.write(b".")
    time.sleep(float(step))

def main():
    answerer = load_answerer(adapter=adapter, model=model, template="alpaca", runs=Path("runs"))
    answerer.model.get_base_model().register_forward_pre_hook(slow)
    settings = generation_settings(generation_keys(sys.argv[8:]))
    serve(answerer, settings, host=host, port=int(port), open_browser=False)

sys.exit(run_command(main))
"""


class Server:
    """The page of the tiny model; ``here`` is where it runs and ``temporary`` where it may write.

    Folders and files of ``beside`` are the test's own.
    """

    def __init__(self, folder, adapter, model, *keys, host="127.0.0.1", port=0):  # noqa: F811
        self.here, self.temporary = folder / "here", folder / "temporary"
        self.passes, self.elsewhere, self.errors = (
            folder / name for name in ("passes", "elsewhere", "errors")
        )
        for made in (self.here, self.temporary):
            made.mkdir(parents=True)
        # What would open the page to everybody, and be told to everybody.
        loud = {"GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_DEBUG": "1"}
        arguments = [adapter, model, host, port, self.passes, self.elsewhere, STEP, *keys]
        with self.errors.open("w") as errors:
            self.child = subprocess.Popen(
                [sys.executable, "-c", SERVER, *map(str, arguments)],
                cwd=self.here,
                env={**os.environ, "TMPDIR": str(self.temporary), **loud},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.address = self._line().split()[0]

    def _line(self):
        assert select.select([self.child.stdout], [], [], 120)[0], self.errors.read_text()
        line = self.child.stdout.readline()
        assert line, self.errors.read_text()
        return line

    @property
    def read(self):
        """How many forward passes there were."""
        return self.passes.stat().st_size if self.passes.exists() else 0

    def request(self, method, path, **headers):
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=10)
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    def end(self, number=signal.SIGINT):
        """Its exit code, and all that it said on stderr."""
        if self.child.poll() is None:
            self.child.send_signal(number)
        code = self.child.wait(timeout=60)
        assert self.child.stdout.read() == ""
        return code, self.errors.read_text()


@pytest.fixture(scope="module")
def server(adapter, tiny_checkpoint, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("live")
    started = Server(folder, adapter, tiny_checkpoint, "max_new_tokens=12")
    yield started
    started.end(signal.SIGKILL)


@dataclass
class Tab:
    """A visitor's page, and all that it asked for or complained of."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self, name):
        return self.page.locator(f"#{name} textarea, #{name} input").first

    def fill(self, **texts):
        for name, text in texts.items():
            self.text(name).fill(text)

    def choose(self, strategy):
        self.text("strategy").click()
        self.page.get_by_role("option", name=strategy, exact=True).click()

    def compare(self):
        self.page.locator("#compare").click()

    def says(self, name, pattern):
        playwright.expect(self.text(name)).to_have_value(re.compile(pattern), timeout=60_000)
        return self.text(name).input_value()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open the page; nothing beyond the server can be reached, and nothing may be tried."""
    tabs = []

    def opened(server):
        context = chromium.new_context(viewport={"width": 1280, "height": 1000})
        tab = Tab(context.new_page())
        tabs.append((context, server, tab))
        context.route(lambda url: not url.startswith(server.address), lambda route: route.abort())
        tab.page.on("request", lambda one: tab.requests.append(one.url))
        tab.page.on("websocket", lambda one: tab.requests.append(one.url))
        tab.page.on("pageerror", lambda one: tab.complaints.append(str(one)))
        tab.page.on("dialog", lambda one: (tab.complaints.append("dialog"), one.dismiss()))
        tab.page.on(
            "console",
            lambda one: one.type in ("error", "warning") and tab.complaints.append(one.text),
        )
        tab.page.goto(server.address)
        tab.text("prompt").wait_for()
        return tab

    yield opened
    for context, server, tab in tabs:
        context.close()
        assert tab.requests
        assert [url for url in tab.requests if not url.startswith(f"{server.address}/")] == []
        assert tab.complaints == []


def test_both_answers_stream_and_are_those_of_generate(server, visit, generated):  # noqa: F811
    tab = visit(server)
    tab.fill(prompt="Repeat the word.", context="river", max_new_tokens="24")
    tab.compare()
    seen = {"base": [], "tuned": []}
    while "tokens/s" not in tab.text("tuned-end").input_value():
        for name, texts in seen.items():
            texts.append(tab.text(name).input_value())
    expected = generated("max_new_tokens=24", context="river")
    for name, record in (("base", expected["base"]), ("tuned", expected["adapter"])):
        assert tab.text(name).input_value() == record["text"]
        assert len(set(seen[name])) > 5
        assert all(record["text"].startswith(text) for text in seen[name])
        end = rf"^{record['finish_reason']} · {len(record['ids'])} tokens, [\d.]+ tokens/s$"
        tab.says(f"{name}-end", end)
    first = next(at for at, text in enumerate(seen["tuned"]) if text)
    assert seen["base"][first] == expected["base"]["text"]  # they take turns
    tab.says("status", "^greedy_search max_new_tokens=24$")
    tab.page.screenshot(path=server.here.parent / "live.png", full_page=True)


def test_a_strategy_has_its_fields_and_is_used(server, visit, generated):  # noqa: F811
    tab = visit(server)
    assert not tab.page.locator("#temperature").is_visible()
    tab.choose("sample")
    tab.fill(temperature="1.4", top_p="0.9", seed="5", prompt="Greet.")
    assert not tab.page.locator("#num_beams").is_visible()
    tab.compare()
    tab.says("tuned-end", "tokens/s$")
    keys = ["strategy=sample", "temperature=1.4", "top_p=0.9", "seed=5", "max_new_tokens=12"]
    expected = generated(*keys, prompt="Greet.", context="")
    assert tab.text("base").input_value() == expected["base"]["text"]
    assert tab.text("tuned").input_value() == expected["adapter"]["text"]
    tab.choose("beam_search")  # what was typed for another strategy is in nobody's way
    tab.fill(num_beams="3")
    tab.compare()
    tab.says("status", "^beam_search max_new_tokens=12 num_beams=3$")
    tab.says("tuned-end", "tokens/s$")
    expected = generated("strategy=beam_search", "num_beams=3", "max_new_tokens=12",
                         prompt="Greet.", context="")  # fmt: skip
    assert tab.text("tuned").input_value() == expected["adapter"]["text"]


SCRIPT = "<script>top.owned=1</script><img src=x onerror='top.owned=1'>"


def test_markup_in_prompt_and_answers_is_text(server, visit):
    """A phrase that the answer must contain is how the tiny model is made to write it."""
    tab = visit(server)
    tab.choose("constrained_beam_search")
    tab.fill(prompt=SCRIPT, context=SCRIPT, num_beams="2", max_new_tokens="80")
    tab.fill(force_words=f'["{SCRIPT}"]')
    tab.compare()
    assert SCRIPT in tab.says("tuned", re.escape(SCRIPT))
    assert SCRIPT in tab.text("base").input_value()
    assert tab.text("prompt").input_value() == SCRIPT
    assert tab.page.locator("img[src=x]").count() == 0
    assert tab.page.evaluate("() => window.owned === undefined")


def test_a_mistake_is_a_message(server, visit):
    tab = visit(server)
    tab.fill(prompt="", max_new_tokens="0", further="temprature=<b>1</b>")
    tab.compare()
    said = tab.says("status", "prompt: empty. Write what is asked.$")
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "max_new_tokens", "temprature", "prompt",
    ]  # fmt: skip
    assert "Traceback" not in server.errors.read_text()


LONG = {"max_new_tokens": "150", "further": "min_new_tokens=150"}


def test_stop_ends_the_answer(server, visit):
    tab = visit(server)
    tab.fill(prompt="Greet.", **LONG)
    tab.compare()
    tab.says("base", ".")
    tab.page.locator("#stop").click()
    tab.says("base-end", "^interrupted · ")
    tab.says("status", "^Stopped: ")
    assert tab.text("tuned-end").input_value() == ""
    before = server.read
    time.sleep(10 * STEP)
    assert server.read == before


def test_a_closed_tab_leaves_the_model_free(server, visit):
    tab = visit(server)
    tab.fill(prompt="Greet.", **LONG)
    tab.compare()
    tab.says("base", ".")
    begun = server.read
    tab.page.close()
    until(lambda: (before := server.read, time.sleep(10 * STEP)) and server.read == before)
    assert server.read - begun < 100


def test_a_closed_tab_that_waits_is_forgotten(server, visit):
    first, second = visit(server), visit(server)
    first.fill(prompt="Greet.", max_new_tokens="50", further="min_new_tokens=50")
    second.fill(prompt="Name a fruit.")
    before = server.read
    first.compare()
    first.says("base", ".")
    second.compare()
    second.says("status", "^Somebody else's answers are being written")
    second.page.close()
    first.says("tuned-end", "tokens/s$")
    time.sleep(10 * STEP)
    assert server.read - before == 2 * 50


def test_two_visitors_take_turns(server, visit, generated):  # noqa: F811
    first, second = visit(server), visit(server)
    first.fill(prompt="Greet.", max_new_tokens="60")
    second.fill(prompt="Name a fruit.")
    first.compare()
    first.says("base", ".")
    second.compare()
    second.says("status", "^Somebody else's answers are being written")
    for tab, prompt, tokens in ((first, "Greet.", 60), (second, "Name a fruit.", 12)):
        tab.says("tuned-end", "tokens/s$")
        expected = generated(f"max_new_tokens={tokens}", prompt=prompt, context="")
        assert tab.text("base").input_value() == expected["base"]["text"]
        assert tab.text("tuned").input_value() == expected["adapter"]["text"]


def test_the_server_answers_to_its_own_name_and_takes_no_files(server):
    assert server.request("GET", "/")[0] == 200
    assert server.request("GET", "/", Host="evil.example") == (403, "refused")
    assert server.request("POST", "/gradio_api/queue/join", Host="evil.example")[0] == 403
    for path in ("/gradio_api/upload", "/gradio_api/process_recording", "/login"):
        assert server.request("POST", path) == (403, "refused")
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert server.request("GET", path)[0] == 404
    endpoints = server.request("GET", "/gradio_api/info")[1]
    assert '"named_endpoints":{},"unnamed_endpoints":{}' in endpoints


def test_the_server_called_nobody_and_wrote_nothing(server):
    """Behind all tests above."""
    assert not server.elsewhere.exists(), server.elsewhere.read_text()
    assert list(server.here.iterdir()) == []
    ours = [path for path in server.temporary.iterdir() if path.name != "torchinductor_root"]
    (folder,) = (path for path in ours if path.name.startswith("recipe-live-"))
    assert [path for path in folder.rglob("*") if not path.is_dir()] == []
    assert server.errors.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_while_it_answers(adapter, tiny_checkpoint, tmp_path, visit, number):  # noqa: F811
    server = Server(tmp_path, adapter, tiny_checkpoint, "max_new_tokens=150", "min_new_tokens=150")
    tab = visit(server)
    tab.fill(prompt="Greet.")
    tab.compare()
    tab.says("base", ".")
    started = time.monotonic()
    assert server.end(number) == (128 + number, "stopped\n")
    assert time.monotonic() - started < 10
    tab.complaints.clear()  # the page says that nobody is there any more
    assert [path for path in server.temporary.iterdir() if "recipe" in path.name] == []


def test_who_serves_others_is_warned(adapter, tiny_checkpoint, tmp_path):  # noqa: F811
    server = Server(tmp_path, adapter, tiny_checkpoint, host="0.0.0.0")
    assert server.address.startswith("http://127.0.0.1:")
    assert server.request("GET", "/", Host="any.name")[0] == 200
    code, said = server.end()
    assert code == 130
    assert said.splitlines() == [
        "--host: 0.0.0.0 is not this machine alone, and the page has no password: whoever can "
        "reach it can use the model.",
        "stopped",
    ]

"""Base and tuned answers side by side in a browser, as they are written.

The page is gradio's, an optional extra. Nothing is sent to anybody, the browser loads nothing from
elsewhere, and no file stays behind.
"""

import errno
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from recipe.answerer import Answerer, load_assistant
from recipe.settings import GenerationSettings, Stopped, UserError
from recipe.settings.strategies import USES
from recipe.side_by_side import FIELDS, Asked, Comparer

_LOOPBACK = "127.0.0.1"
_USUAL_PORTS = range(7860, 7880)
_AT_ONCE = 8  # visitors who are answered or wait for it; gradio tells further ones their place
# A page may take nothing from elsewhere and stand in no other page's frame. Gradio's own scripts
# and styles are partly inline.
_POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; font-src 'self' data:; base-uri 'self'; form-action 'none'; "
    b"frame-ancestors 'none'"
)
# What gradio would take in otherwise are uploads.
_POSTED = ("/gradio_api/queue/", "/gradio_api/run/", "/gradio_api/cancel", "/gradio_api/reset")

_KEYS = tuple(dict.fromkeys(key for used in FIELDS.values() for key in used))
_App = Callable[[Any, Any, Any], Awaitable[None]]


def require_gradio() -> None:
    """Can be asked before anything is loaded.

    Raises:
        UserError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        said = "gradio is not installed. Run make demo, or pip install -e '.[demo]'."
        raise UserError.single("--live", said)


def serve(
    answerer: Answerer,
    settings: GenerationSettings,
    *,
    host: str | None,
    port: int | None,
    open_browser: bool,
) -> None:
    """Serve the page until Ctrl-C; its address is printed once it can be opened.

    Args:
        settings: what the page's fields hold at first.
        host: None for this machine alone.
        port: None for a free one from 7860 on, 0 for any free one.

    Raises:
        UserError: gradio is not installed, the address is taken, or the settings do not fit.
        KeyboardInterrupt: Ctrl-C was pressed.
        Stopped: by SIGTERM.
    """
    require_gradio()
    assistant = None
    if settings.assistant_model:
        assistant = load_assistant(settings.assistant_model, answerer)
    answerer.decoder(settings, assistant=assistant).check([])
    start = Asked.as_given(settings)
    start.settings()
    comparer = Comparer(answerer, assistant=assistant, assistant_model=settings.assistant_model)
    with (
        _listening(host or _LOOPBACK, port) as listener,
        TemporaryDirectory(prefix="recipe-live-") as folder,
        _hearing_sigterm(),
    ):
        _keep_to_itself(folder)
        address = _address(listener)
        app = _guarded(_application(_page(comparer, start, answerer.described)), listener)
        with _serving(app, listener, comparer):
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if open_browser:
                webbrowser.open(address)
            threading.Event().wait()


def _keep_to_itself(folder: str) -> None:
    """Before gradio is imported: it sends usage statistics, and can be opened to the world by the
    environment. ``folder`` is where it may write.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": folder,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _page(comparer: Comparer, start: Asked, described: str) -> Any:
    """The gradio page. Answers stand in text fields, which show markup as what it is."""
    import gradio as gr

    def compare(request: gr.Request, *typed: str | None) -> Iterator[tuple[str, ...]]:
        instruction, context, strategy, further, *fields = (text or "" for text in typed)
        asked = Asked(
            instruction, context, strategy, dict(zip(_KEYS, fields, strict=True)), further
        )
        for shown in comparer.compare(asked, visitor=str(request.session_hash)):
            base, tuned = shown.base, shown.tuned
            yield base.text, base.end, tuned.text, tuned.end, shown.status

    def leave(request: gr.Request) -> None:
        comparer.stop(str(request.session_hash))

    def choose(strategy: str) -> list[Any]:
        return [gr.Textbox(visible=key in FIELDS.get(strategy, ())) for key in _KEYS]

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Base and tuned", analytics_enabled=False) as page:
        gr.Textbox(described, label="Tuned model", interactive=False, elem_id="described")
        inputs = _inputs(start)
        instruction, _, strategy, _, *fields = inputs
        with gr.Row():
            ask = gr.Button("Compare", variant="primary", elem_id="compare")
            stop = gr.Button("Stop", elem_id="stop")
        gr.on(
            [ask.click, instruction.submit],
            compare,
            inputs,
            _outputs(),
            concurrency_limit=_AT_ONCE,
            **hidden,
        )
        stop.click(leave, queue=False, **hidden)
        strategy.change(choose, strategy, fields, queue=False, **hidden)
        page.unload(leave)
    return page.queue(api_open=False)


def _inputs(start: Asked) -> list[Any]:
    """Prompt, input, strategy, further keys, and a field for each of ``_KEYS``."""
    import gradio as gr

    instruction = gr.Textbox(label="Prompt", lines=3, elem_id="prompt")
    context = gr.Textbox(label="Input, if there is one", elem_id="context")
    with gr.Row():
        strategy = gr.Dropdown(
            list(FIELDS), value=start.strategy, label="strategy", elem_id="strategy"
        )
        fields = [
            gr.Textbox(
                start.fields.get(key, ""),
                label=key,
                info=USES[key][0].help,
                max_lines=1,
                visible=key in FIELDS[start.strategy],
                elem_id=key,
            )
            for key in _KEYS
        ]
    said = "Further fields of GenerationConfig, one key=value a line"
    further = gr.Textbox(start.further, label=said, elem_id="further")
    return [instruction, context, strategy, further, *fields]


def _outputs() -> list[Any]:
    """Base, how it ended, tuned, how it ended, status."""
    import gradio as gr

    status = gr.Textbox(label="Status", interactive=False, elem_id="status")
    answers = []
    with gr.Row():
        for name in ("base", "tuned"):
            with gr.Column():
                said = gr.Textbox(
                    label=name.capitalize(),
                    lines=12,
                    interactive=False,
                    buttons=["copy"],
                    elem_id=name,
                )
                end = gr.Textbox(
                    label=f"{name.capitalize()}: how it ended",
                    show_label=False,
                    interactive=False,
                    elem_id=f"{name}-end",
                )
                answers += [said, end]
    return [*answers, status]


def _application(page: Any) -> _App:
    from fastapi import FastAPI
    from gradio import mount_gradio_app

    undocumented: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app: _App = mount_gradio_app(
        FastAPI(**undocumented),
        page,
        path="/",
        app_kwargs=undocumented,
        footer_links=[],
        run_history=False,
        max_file_size=0,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
    )
    return app


def _guarded(app: _App, listener: socket.socket) -> _App:
    """Answers what comes under its own name: another site that makes its name this machine's could
    use the model. And takes no files.
    """
    port = listener.getsockname()[1]
    names = {f"{name}:{port}" for name in (_LOOPBACK, "localhost", "[::1]")}

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        posted = scope["method"] not in ("GET", "HEAD")
        if (_is_here(listener) and named not in names) or (
            posted and not scope["path"].startswith(_POSTED)
        ):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"refused"})
            return

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY),
                ]
            await send(message)

        await app(scope, receive, send_with_policy)

    return guarded


@contextmanager
def _listening(host: str, port: int | None) -> Iterator[socket.socket]:
    """A socket that nobody else can take any more.

    Raises:
        UserError: the address cannot be had.
    """
    listener = _first_free(host, [*_USUAL_PORTS, 0] if port is None else [port])
    with listener:
        if not _is_here(listener):
            said = "the page has no password: whoever can reach it can use the model."
            print(f"--host: {host} is not this machine alone, and {said}", file=sys.stderr)
        yield listener


def _first_free(host: str, ports: Sequence[int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server((host, port), family=family)
        except OverflowError as error:
            said = f"{port} is none, expected 0 to 65535, where 0 is any free one. Correct it."
            raise UserError.single("--port", said) from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            where, what = ("--port", port) if error.errno == errno.EACCES else ("--host", host)
            reason = str(error.strerror or error).split(" (while")[0]
            said = f"{what} cannot be listened on: {reason}. Name another."
            raise UserError.single(where, said) from error
    raise UserError.single(
        "--port", f"{ports[0]} on {host} is taken. Name another, or 0 for any free one."
    )


def _is_here(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def _address(listener: socket.socket) -> str:
    """Where this machine's browser finds it."""
    host, port = listener.getsockname()[:2]
    ip = ipaddress.ip_address(host)
    if ip.is_unspecified:
        host = _LOOPBACK if ip.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _serving(app: _App, listener: socket.socket, comparer: Comparer) -> Iterator[None]:
    """The server runs beside this thread, which hears Ctrl-C."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="error", access_log=False, ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=[[listener]], daemon=True)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the page's server did not start; see above.")
            time.sleep(0.02)
        yield
    finally:
        comparer.stop()
        logging.getLogger("uvicorn.error").disabled = True  # it tells of each page that is cut off
        server.should_exit = True
        thread.join(timeout=10)


@contextmanager
def _hearing_sigterm() -> Iterator[None]:
    """``kill`` ends it as Ctrl-C does, the temporary folder is removed."""

    def hear(number: int, _frame: FrameType | None) -> None:
        raise Stopped("stopped", signal_number=number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Makes a run tell its board what it does; nothing of what it computes is touched."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from tests.faults.board import Board

_TOUCHES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}


def watch(board: Board) -> None:
    """Wrap the Trainer's methods in this process; call it before the run begins."""
    from transformers.trainer_callback import CallbackHandler

    from recipe.sharing import adapter_folder
    from recipe.training.trainer import TokenWeightedTrainer

    _wrap(CallbackHandler, "on_step_begin", lambda call: _step_begins(board, call))
    _wrap(CallbackHandler, "on_step_end", lambda call: _step_ends(board, call))
    _wrap(TokenWeightedTrainer, "training_step", lambda call: _micro_batch(board, call))
    _wrap(TokenWeightedTrainer, "_save_checkpoint", lambda call: _during(board, "save", call))
    # Today the seal is set there, behind the Trainer's own save.
    on_save = functools.partial(_during, board, "save", enters=False)
    _wrap(CallbackHandler, "on_save", on_save)
    evaluation = functools.partial(_during, board, "evaluation")
    _wrap(TokenWeightedTrainer, "evaluation_loop", evaluation)
    save = adapter_folder.save_adapter
    for name, module in list(sys.modules.items()):
        if name.startswith("recipe.") and getattr(module, "save_adapter", None) is save:
            module.save_adapter = _during(board, "adapter", save)
    _count_touches(board)


def _wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    setattr(owner, name, wrapper(getattr(owner, name)))


def _during(board: Board, phase: str, call: Any, *, enters: bool = True) -> Any:
    @functools.wraps(call)
    def wrapped(*args: Any, **named: Any) -> Any:
        before = board.turn(phase, enters=enters)
        try:
            return call(*args, **named)
        finally:
            board.turn(before, enters=False)

    return wrapped


def _step_begins(board: Board, call: Any) -> Any:
    @functools.wraps(call)
    def wrapped(*args: Any, **named: Any) -> Any:
        board.begin_step()
        board.turn("step", enters=False)
        return call(*args, **named)

    return wrapped


def _step_ends(board: Board, call: Any) -> Any:
    @functools.wraps(call)
    def wrapped(*args: Any, **named: Any) -> Any:
        try:
            return call(*args, **named)
        finally:
            board.end_step()
            board.turn("other", enters=False)

    return wrapped


def _micro_batch(board: Board, call: Any) -> Any:
    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **named: Any) -> Any:
        board.turn("step")
        try:
            return call(self, *args, **named)
        finally:
            # The last of a window is followed by the optimizer's step, which belongs to it.
            if not self.accelerator.sync_gradients:
                board.turn("between")

    return wrapped


def _count_touches(board: Board) -> None:
    """What writes, makes, renames or removes a file; C++ and Rust write unseen."""
    import torch

    process = os.getpid()  # a data worker is another

    def touch() -> None:
        if os.getpid() == process and board.phase in ("save", "adapter"):
            board.operate()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in _TOUCHES:
            touch()

    def touching(call: Any) -> Any:
        @functools.wraps(call)
        def wrapped(*args: Any, **named: Any) -> Any:
            touch()
            return call(*args, **named)

        return wrapped

    sys.addaudithook(audit)
    _wrap(os, "fsync", touching)
    _wrap(torch, "save", touching)

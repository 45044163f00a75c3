"""What can happen to a checkpoint on a disk: the 22 kinds of facts.md, and some of our own.

Of these 22 the stock Trainer loads 6 silently with another result and ends with a traceback on 12.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

ADAPTER = "adapter_model.safetensors"
SENTINEL = "checkpoint-is-incomplete.txt"

Damage = Callable[[Path], object]


def truncated(name: str) -> Damage:
    def harm(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: len(content) // 2])

    return harm


def emptied(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).write_bytes(b"")


def zeroed(name: str) -> Damage:
    def harm(checkpoint: Path) -> None:
        size = (checkpoint / name).stat().st_size
        (checkpoint / name).write_bytes(bytes(size))

    return harm


def one_byte_changed(name: str) -> Damage:
    """In the second half, where the tensors are."""

    def harm(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) * 3 // 4] ^= 1
        (checkpoint / name).write_bytes(content)

    return harm


def missing(name: str) -> Damage:
    return lambda checkpoint: (checkpoint / name).unlink()


def edited(name: str, key: str, value: object) -> Damage:
    def harm(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        assert content[key] != value
        (checkpoint / name).write_text(json.dumps({**content, key: value}))

    return harm


def only(*names: str) -> Damage:
    """As a kill leaves it that hit between two files of a save."""

    def harm(checkpoint: Path) -> None:
        for file in checkpoint.iterdir():
            if file.name not in names:
                file.unlink()

    return harm


def a_file_in_its_place(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def gone_through_a_link(checkpoint: Path) -> None:
    """The disk that a user moved it to is not there any more."""
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(checkpoint.parent / "absent")


# The stock Trainer: "silent" loads it with another result, "crash" ends with a traceback.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "adapter truncated": (truncated(ADAPTER), "crash"),
    "adapter of 0 bytes": (emptied(ADAPTER), "crash"),
    "adapter of zeros": (zeroed(ADAPTER), "crash"),
    "adapter, one byte changed": (one_byte_changed(ADAPTER), "silent"),
    "adapter missing": (missing(ADAPTER), "crash"),
    "empty folder": (only(), "crash"),
    "optimizer missing": (missing("optimizer.pt"), "silent"),
    "scheduler missing": (missing("scheduler.pt"), "silent"),
    "random state missing": (missing("rng_state.pth"), "silent"),
    "optimizer truncated": (truncated("optimizer.pt"), "crash"),
    "optimizer of 0 bytes": (emptied("optimizer.pt"), "crash"),
    "optimizer, one byte changed": (one_byte_changed("optimizer.pt"), "silent"),
    "random state truncated": (truncated("rng_state.pth"), "crash"),
    "state missing": (missing("trainer_state.json"), "crash"),
    "state of 0 bytes": (emptied("trainer_state.json"), "crash"),
    "state truncated": (truncated("trainer_state.json"), "crash"),
    "state, step edited": (edited("trainer_state.json", "global_step", 1), "silent"),
    "adapter config missing": (missing("adapter_config.json"), "harmless"),
    "adapter config, rank edited": (edited("adapter_config.json", "r", 2), "harmless"),
    "arguments missing": (missing("training_args.bin"), "harmless"),
    "only the adapter": (only(ADAPTER, "adapter_config.json"), "crash"),
    "sentinel of an unfinished save": (
        lambda checkpoint: (checkpoint / SENTINEL).write_text(""),
        "harmless",
    ),
}

# Of files that only this recipe has, and of the folder as a whole.
MORE: dict[str, Damage] = {
    "seal missing": missing("sha256.json"),
    "seal truncated": truncated("sha256.json"),
    "seal of 0 bytes": emptied("sha256.json"),
    "log's state missing": missing("run_log.json"),
    "log's state edited": edited("run_log.json", "trained_tokens", 0),
    "scheduler, one byte changed": one_byte_changed("scheduler.pt"),
    "random state, one byte changed": one_byte_changed("rng_state.pth"),
    "a file in its place": a_file_in_its_place,
    "a link to nothing": gone_through_a_link,
}

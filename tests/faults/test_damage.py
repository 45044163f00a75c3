"""A damaged checkpoint is never loaded: the newest whole one is, and the screen says why."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from recipe.finetune import finetune
from recipe.settings import UserError, load_settings
from tests.faults.comparison import checkpoints, differences
from tests.faults.damages import DAMAGES, MORE, missing, one_byte_changed
from tests.faults.scenarios import Scenario

KINDS = {**{name: harm for name, (harm, _) in DAMAGES.items()}, **MORE}
NEWEST, BEFORE = 12, 10


class StopAt(TrainerCallback):
    """As a crash would end it, at the first micro-batch behind ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def run(config: Path, *overrides: str, watchers: Any = ()) -> Path:
    return finetune(load_settings(str(config), overrides), watchers=watchers)


Stopped = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, rows: Path) -> Stopped:
    """Config, whole run and one that stopped behind step 12, with checkpoints 8, 10 and 12."""
    folder = tmp_path_factory.mktemp("damage")
    scenario = Scenario("damage", "0:9", 5, 2, True, training={"eval_strategy": "epoch"})
    config = scenario.write_config(folder, model=str(tiny_checkpoint), rows=rows)
    whole = run(config, f"training.output_dir={folder / 'whole'}")
    with pytest.raises(RuntimeError, match="power cut"):
        run(config, f"training.output_dir={folder / 'stopped'}", watchers=[StopAt(NEWEST)])
    for step in (2, 4, 6):
        shutil.rmtree(folder / f"stopped/checkpoint-{step}")
        shutil.rmtree(whole / f"checkpoint-{step}")
    assert checkpoints(folder / "stopped") == [8, BEFORE, NEWEST]
    return config, whole, folder / "stopped"


@pytest.fixture
def copied(stopped: Stopped, tmp_path: Path) -> Callable[..., Stopped]:
    """A copy of the stopped run, damaged; what is compared with has checkpoints as it has."""

    def copy(harm: Callable[[Path], object], *steps: int) -> Stopped:
        config, whole, left = stopped
        folder = shutil.copytree(left, tmp_path / "run", symlinks=True)
        for step in steps:
            harm(folder / f"checkpoint-{step}")
        return config, whole, folder

    return copy


def resume(config: Path, asked: Path) -> Path:
    return run(config, f"training.resume_from_checkpoint={asked}")


def taken(screen: str) -> str:
    """The name of the checkpoint that the run says it goes on from."""
    (line,) = (line for line in screen.splitlines() if line.startswith("resumed "))
    return Path(line.split("from ")[1].split()[0].rstrip(",;")).name


def test_all_22_kinds_are_here():
    stock = [said for _, said in DAMAGES.values()]
    assert (stock.count("silent"), stock.count("crash"), stock.count("harmless")) == (6, 12, 4)


def test_an_intact_one_is_taken(copied, capsys):
    config, whole, folder = copied(lambda checkpoint: None)
    resume(config, folder)
    screen = capsys.readouterr().out
    assert taken(screen) == f"checkpoint-{NEWEST}"
    assert "left out" not in screen
    assert differences(folder, whole) == []


@pytest.mark.parametrize(
    "kind", [*DAMAGES, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
)
def test_the_whole_one_before_is_taken(copied, capsys, kind):
    config, whole, folder = copied(KINDS[kind], NEWEST)
    resume(config, folder)
    screen = capsys.readouterr().out
    # The sentinel is an empty file more, which nothing reads.
    expected = NEWEST if kind.startswith("sentinel") else BEFORE
    assert taken(screen) == f"checkpoint-{expected}"
    if expected == BEFORE:
        (line,) = (line for line in screen.splitlines() if "left out" in line)
        assert f"checkpoint-{NEWEST}" in line
    assert differences(folder, whole) == []


def test_two_damaged_ones_are_both_left_out(copied, capsys):
    config, whole, folder = copied(one_byte_changed("optimizer.pt"), NEWEST, BEFORE)
    resume(config, folder)
    screen = capsys.readouterr().out
    assert taken(screen) == "checkpoint-8"
    said = [line for line in screen.splitlines() if "left out" in line]
    assert len(said) == 2
    for step, line in zip((NEWEST, BEFORE), said, strict=True):
        assert f"checkpoint-{step}" in line
    assert differences(folder, whole) == []


def test_without_a_whole_one_nothing_goes_on(copied):
    config, _, folder = copied(missing("scheduler.pt"), NEWEST, BEFORE, 8)
    with pytest.raises(UserError) as raised:
        resume(config, folder)
    assert len(raised.value.problems) == 3
    assert not (folder / "adapter").exists()


def test_a_damaged_one_that_was_named_is_refused_and_a_whole_one_named(copied):
    config, whole, folder = copied(one_byte_changed("adapter_model.safetensors"), NEWEST)
    with pytest.raises(UserError, match=f"checkpoint-{BEFORE}"):
        resume(config, folder / f"checkpoint-{NEWEST}")
    resume(config, folder / f"checkpoint-{BEFORE}")
    assert differences(folder, whole) == []

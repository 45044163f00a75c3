"""What a lesson is asked and what it teaches; imports nothing heavy."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.settings import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Taught:
    """A lesson as it came out on this machine.

    Attributes:
        figure: for ``savefig``; 900 pixels wide at its own dpi.
        paragraph: three to eight sentences with the measured numbers in them.
        numbers: all that is drawn or said, for ``json.dumps(..., allow_nan=False)``; units are in
            the names.
    """

    figure: "Figure"
    paragraph: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What a lesson is given.

    Attributes:
        model: a folder with a LlamaForCausalLM checkpoint in safetensors.
        adapter: a folder with a trained PEFT adapter of that model.
        seed: of all that is drawn at random; two lessons of one seed differ in their times only.
    """

    model: str | None = None
    adapter: str | None = None
    seed: int = 0

    @property
    def model_folder(self) -> Path:
        """Raises UserError where none is given, or where there is no such folder."""
        return _folder(
            self.model,
            "--model",
            "a folder with a LlamaForCausalLM checkpoint, such as models/smollm2-135m-instruct, "
            "which `make setup` makes",
        )

    @property
    def adapter_folder(self) -> Path:
        """Raises UserError where none is given, or where there is no such folder."""
        return _folder(
            self.adapter,
            "--adapter",
            "a folder with a trained adapter, such as runs/starter-001/adapter, which `make train` "
            "makes",
        )


def _folder(given: str | None, option: str, example: str) -> Path:
    if given is None:
        raise UserError.single(option, f"this lesson needs one, and none is given. Name {example}.")
    if not Path(given).is_dir():
        raise UserError.single(option, f"there is no folder {given}. Name {example}.")
    return Path(given)


@dataclass(frozen=True)
class Lesson:
    """One question of the reports, and what measures its answer.

    Attributes:
        question: one line.
        needs_model: without ``Asked.model`` it cannot be taught.
        needs_adapter: the same of ``Asked.adapter``.
        measure: imports what it needs, and measures.
    """

    name: str
    question: str
    needs_model: bool
    needs_adapter: bool
    measure: Callable[[Asked], Taught]

    def teach(self, asked: Asked) -> Taught:
        """Measure on this machine, on the CPU.

        Raises:
            UserError: a folder that is needed is not given, not there, or not what it should be.
        """
        # Before imports that take seconds.
        if self.needs_model or asked.model is not None:
            _ = asked.model_folder
        if self.needs_adapter or asked.adapter is not None:
            _ = asked.adapter_folder
        return self.measure(asked)

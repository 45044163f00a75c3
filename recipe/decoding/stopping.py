"""Why an answer ends: its EOS, a given text, its length, or Ctrl-C. One of them is always told."""

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

FinishReason = Literal["eos", "stop", "length", "interrupted"]
# A token is at least a byte long, special ones aside; some tokenizers drop a space at the front.
_SLACK_TOKENS = 4


class Stop:
    """Looks at the tokens of an answer, the prompt's not among them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: Iterable[int],
        stop_strings: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        self.eos_token_ids = frozenset(eos_token_ids)
        self.stop_strings = tuple(stop_strings)
        self.max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        longest = max((len(text.encode()) for text in stop_strings), default=0)
        self._window = longest + _SLACK_TOKENS

    def reason(self, ids: Sequence[int]) -> FinishReason | None:
        """Why the answer ends with its last token; None if it goes on."""
        if ids[-1] in self.eos_token_ids:
            return "eos"
        if self.stop_strings:
            tail = self._decoded(ids[-self._window :])
            if any(text in tail for text in self.stop_strings):
                return "stop"
        return "length" if len(ids) >= self.max_new_tokens else None

    def ended(self, ids: Sequence[int]) -> tuple[list[int], FinishReason]:
        """What of ``ids`` is the answer, and why it ends there: ``interrupted`` if nothing else.

        Somebody else wrote them, and may have gone on, or filled them up, behind the end.
        """
        for at in range(1, len(ids) + 1):
            reason = self.reason(ids[:at])
            if reason:
                return list(ids[:at]), reason
        return list(ids), "interrupted"

    def text(self, ids: Sequence[int]) -> str:
        """The answer, up to the first stop string, without special tokens."""
        whole = self._decoded(ids)
        found = [at for text in self.stop_strings if (at := whole.find(text)) >= 0]
        return whole[: min(found)] if found else whole

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class StopStrings(StoppingCriteria):
    """``Stop`` for transformers' own loops, whose StopStringCriteria reads the prompt too."""

    def __init__(self, stop: Stop, prompt_tokens: int) -> None:
        self._stop = stop
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        answers = input_ids[:, self._prompt_tokens :].tolist()
        found = [bool(ids) and self._stop.ended(ids)[1] == "stop" for ids in answers]
        return torch.tensor(found, device=input_ids.device)


class Interruption(StoppingCriteria):
    """Whether Ctrl-C was pressed. transformers' own loops ask it as a stopping criterion."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.happened, device=input_ids.device)

    @contextmanager
    def listening(self) -> Iterator["Interruption"]:
        """The first Ctrl-C ends what is being written after its present token, a second at once."""
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a shell's & has it
        if ignored or threading.current_thread() is not threading.main_thread():
            yield self
            return

        def first(_signal: int, _frame: FrameType | None) -> None:
            self.happened = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = signal.signal(signal.SIGINT, first)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

"""Text as it comes: never half a letter, never a piece of what may become a stop string."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

_HALF_A_LETTER = "\ufffd"


class Stream(BaseStreamer):
    """Writes an answer piece by piece; the pieces join to ``Stop.text``.

    Only the tokens since the last written piece are decoded, with that piece in front of them:
    some tokenizers drop the space of whatever comes first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], None],
        *,
        stop_strings: Sequence[str] = (),
        skip_prompt: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._stop_strings = tuple(stop_strings)
        self._skip = skip_prompt
        self._ids: list[int] = []
        self._written_to = self._piece_from = 0
        self._held = ""
        self._stopped = False

    def put(self, value: torch.Tensor) -> None:
        """Take tokens, int64 of any shape; transformers hands over the prompt's first."""
        if self._skip:
            self._skip = False
            return
        self.add(value.flatten().tolist())

    def add(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the answer."""
        self._ids += tokens
        before = self._decoded(self._ids[self._piece_from : self._written_to])
        now = self._decoded(self._ids[self._piece_from :])
        if len(now) <= len(before) or now.endswith(_HALF_A_LETTER):
            return
        self._piece_from, self._written_to = self._written_to, len(self._ids)
        self._show(now[len(before) :])

    def end(self) -> None:
        """Write what was held back."""
        before = self._decoded(self._ids[self._piece_from : self._written_to])
        self._show(self._decoded(self._ids[self._piece_from :])[len(before) :])
        if not self._stopped:
            self._write(self._held)
        self._held = ""

    def _show(self, piece: str) -> None:
        if self._stopped:
            return
        text = self._held + piece
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self._stopped, self._held = True, ""
            self._write(text[: min(found)])
            return
        held = self._may_become_a_stop(text)
        self._held = text[len(text) - held :]
        self._write(text[: len(text) - held])

    def _may_become_a_stop(self, text: str) -> int:
        """How many letters at the end begin a stop string."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

"""The model, one token at a time, through its forward method alone: with a KV cache or without."""

from typing import Any

import torch
from transformers import DynamicCache

from recipe.settings import RunFailed


class Steps:
    """A batch of texts that grow by one token a step.

    Shorter rows have pad tokens on their left; positions count from a row's own first token, so a
    row is computed as if it were alone.

    Args:
        ids: int64 (rows, tokens).
        mask: int64 (rows, tokens), 0 where padded; None where nothing is.
        use_cache: False reads the whole text again for each token.
        hidden_states: keep them in what ``read`` returns.
    """

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        use_cache: bool = True,
        hidden_states: bool = False,
    ) -> None:
        self.model = model
        self.ids = ids
        self._mask = mask
        self._cache = DynamicCache(config=model.config) if use_cache else None
        self._unread = ids
        self._hidden_states = hidden_states

    def read(self) -> tuple[torch.Tensor, Any]:
        """Read what was appended; return float32 (rows, vocabulary) logits and the model's output.

        Raises:
            RunFailed: a logit is NaN.
        """
        unread = self.ids if self._cache is None else self._unread
        output = self.model(
            input_ids=unread,
            attention_mask=self._mask,
            position_ids=self._positions(unread.shape[1]),
            past_key_values=self._cache,
            use_cache=self._cache is not None,
            logits_to_keep=1,
            output_hidden_states=self._hidden_states,
        )
        logits = output.logits[:, -1].float()
        if logits.isnan().any():
            raise RunFailed(
                "the model's logits are NaN. Use bf16 or fp32 where fp16 overflows, or another "
                "checkpoint or adapter."
            )
        return logits, output

    def append(self, tokens: torch.Tensor) -> None:
        """Append int64 (rows,) tokens, one to each row."""
        self._unread = tokens[:, None]
        self.ids = torch.cat([self.ids, self._unread], dim=1)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._unread)], dim=1)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with ``rows``, int64 indices in any order; one may come several times or never."""
        self.ids = self.ids[rows]
        self._unread = self._unread[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def _positions(self, unread: int) -> torch.Tensor:
        if self._mask is None:
            total = self.ids.shape[1]
            return torch.arange(total - unread, total, device=self.ids.device)[None]
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
        return positions[:, -unread:]

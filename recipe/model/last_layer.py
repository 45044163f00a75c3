"""The last layer's feed-forward part, only at the positions whose logits are asked for.

Behind its attention no position sees another, and of the prompts' no logit is taken.
"""

from typing import Any

import torch
from peft import PeftModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def end_where_nothing_is_predicted(model: PeftModel) -> None:
    """Have the last layer of ``model`` heed the ``predicting`` of ``recipe.data.batch.flatten``.

    What the model then gives at all other positions is without meaning. A layer that peft has
    wrapped, to train it whole, stays as it is; and so does an only one, as accelerate tells the
    layers that FSDP2 shards by the name of the first one's class.
    """
    layers = model.get_base_model().model.layers
    if len(layers) > 1 and type(layers[-1]) is LlamaDecoderLayer:
        layers[-1].__class__ = _LastLayer


class _LastLayer(LlamaDecoderLayer):  # type: ignore[misc]
    def forward(
        self, hidden_states: torch.Tensor, *, predicting: torch.Tensor | None = None, **named: Any
    ) -> torch.Tensor:
        """(1, T, hidden) → the same; ``predicting`` is int64 (P,), each position once."""
        if predicting is None:
            every: torch.Tensor = super().forward(hidden_states, **named)
            return every
        attended: torch.Tensor
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        attended = hidden_states + attended
        some = attended.index_select(1, predicting)
        some = some + self.mlp(self.post_attention_layernorm(some))
        return attended.index_copy(1, predicting, some)

"""DoLa: the last layer's prediction contrasted with that of an earlier layer.

Chuang et al. 2023, arXiv 2309.03883. What a later layer adds to an earlier one's guess is taken as
knowledge; the earlier layer is the one that differs most.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from recipe.settings import UserError

# V_head keeps tokens at least this share as likely as the likeliest (section 2.2 of the paper).
RELATIVE_TOP = 0.1


def candidate_layers(asked: str | Sequence[int], config: LlamaConfig) -> list[int]:
    """The layers that may be contrasted: every second one of the lower or upper half, or as asked.

    As in the paper and as transformers 4 did: at most 20 layers of a deep model, and not the first
    two where embeddings and head are tied, since those read the token back.

    Raises:
        UserError: a layer is not below the last one.
    """
    last = int(config.num_hidden_layers)
    if not isinstance(asked, str):
        beyond = [layer for layer in asked if layer >= last]
        if beyond:
            raise UserError.single(
                "dola_layers", f"{beyond[0]} is not below the last layer, {last}. Lower it."
            )
        return sorted(set(asked))
    first = 2 if config.tie_word_embeddings else 0
    half = last // 2
    if asked == "low":
        return list(range(first, half if last <= 40 else 20, 2)) or [min(first, last - 1)]
    return list(range(half if last <= 40 else last - 20, last, 2))


def contrast(last: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Contrasted scores of each row.

    Each row takes the earlier layer whose distribution has the largest Jensen-Shannon divergence
    from the last layer's. (The published code and transformers 4 averaged it over the batch, so
    that an answer depended on its neighbours, and swapped the arguments of both divergences.)

    Args:
        last: float (rows, vocabulary), logits of the last layer.
        earlier: float (layers, rows, vocabulary), logits of each candidate layer.

    Returns:
        float (rows, vocabulary): log q_last - log q_earlier, and -inf outside V_head.
    """
    log_last, log_earlier = F.log_softmax(last, dim=-1), F.log_softmax(earlier, dim=-1)
    chosen = _divergence(log_last, log_earlier).argmax(dim=0)
    base = log_earlier[chosen, torch.arange(len(last), device=last.device)]
    threshold = log_last.amax(dim=-1, keepdim=True) + torch.tensor(RELATIVE_TOP).log()
    return (log_last - base).masked_fill(log_last < threshold, -torch.inf)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon, (layers, rows)."""
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))

    def kl(log_x: torch.Tensor) -> torch.Tensor:
        return (log_x.exp() * (log_x - log_m)).sum(dim=-1)

    return 0.5 * (kl(log_p) + kl(log_q))


def dola_scores(output: Any, model: Any, layers: Sequence[int]) -> torch.Tensor:
    """(rows, vocabulary) of one forward that kept its hidden states.

    The head reads a layer's hidden state as it is, without the final norm, as the paper's code
    does; ``hidden_states[0]`` are the embeddings.
    """
    head = model.get_output_embeddings()
    earlier = torch.stack([head(output.hidden_states[layer][:, -1]) for layer in layers])
    return contrast(output.logits[:, -1].float(), earlier.float())

"""Contrastive search: a likely token whose hidden state is unlike those before it.

Su et al. 2022, arXiv 2202.06417, equation 5: of the k likeliest tokens v the one with the largest
(1 - penalty_alpha) · p(v) - penalty_alpha · max over earlier tokens j of cos(h_v, h_j).
"""

import torch
import torch.nn.functional as F
from transformers import LogitsProcessorList

from recipe.decoding.sampling import nothing_left
from recipe.decoding.steps import Steps
from recipe.decoding.stopping import FinishReason, Interruption, Stop
from recipe.decoding.stream import Stream


def contrastive_search(
    steps: Steps,
    processors: LogitsProcessorList,
    stop: Stop,
    interruption: Interruption,
    *,
    top_k: int,
    penalty_alpha: float,
    stream: Stream | None = None,
) -> tuple[list[int], FinishReason]:
    """Extend the one row of ``steps``, which keeps its hidden states; new tokens and why they end.

    All candidates are read at once, as a batch of ``top_k`` rows; the chosen one's cache is kept.
    """
    written: list[int] = []
    reason: FinishReason | None = "interrupted" if interruption.happened else None
    logits, output = steps.read()
    states = F.normalize(output.hidden_states[-1][0].float(), dim=-1)
    while reason is None:
        processed = processors(steps.ids, logits)
        if processed.isneginf().all():
            raise nothing_left()
        probabilities, tokens = processed.softmax(dim=-1).topk(top_k, dim=-1)
        steps.select(torch.zeros(top_k, dtype=torch.long, device=steps.ids.device))
        steps.append(tokens[0])
        candidate_logits, output = steps.read()
        candidates = F.normalize(output.hidden_states[-1][:, -1].float(), dim=-1)
        likeness = (candidates @ states.T).amax(dim=-1)
        scores = (1 - penalty_alpha) * probabilities[0] - penalty_alpha * likeness
        # What a processor ruled out is no candidate, though there be fewer than top_k others.
        scores = scores.masked_fill(probabilities[0] == 0, -torch.inf)
        # The first of equals is the likeliest.
        chosen = scores.argmax()[None]
        steps.select(chosen)
        logits = candidate_logits[chosen]
        states = torch.cat([states, candidates[chosen]])
        written += tokens[0, chosen].tolist()
        if stream is not None:
            stream.add(written[-1:])
        reason = stop.reason(written) or ("interrupted" if interruption.happened else None)
    if stream is not None:
        stream.end()
    return written, reason

"""The one batch layout: the rows of a micro-batch behind one another, without padding."""

from collections.abc import Sequence

import numpy as np
import torch

from recipe.data.tokens import TokenizedRow

Batch = dict[str, torch.Tensor | int]


def flatten(rows: Sequence[TokenizedRow]) -> Batch:
    """Lay rows of t1, t2, … tokens into one sequence of T = t1 + t2 + … tokens.

    Positions restart at each row. Logits are asked for only where the next token is trained: K
    positions. The row borders carry the names that transformers gives them for variable-length
    attention, so every kernel reads the same batch.

    Returns:
        ``input_ids``, ``position_ids``: int64 (1, T);
        ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32 (rows + 1), where each row begins and T;
        ``max_length_q``, ``max_length_k``: int, tokens of the longest row;
        ``logits_to_keep``: int64 (K,), positions whose next token is trained;
        ``labels``, ``shift_labels``: int64 (K,), the tokens those positions must predict. The
        Trainer counts ``shift_labels`` as they are; from ``labels`` alone it would drop the first
        of each micro-batch, and the mean over the accumulated batch would silently be wrong.
    """
    lengths = np.array([len(row) for row in rows])
    borders = np.concatenate([[0], lengths.cumsum()])
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    trained = np.concatenate([row.trained for row in rows])
    # A row's first token has nothing before it in its own row that could predict it.
    trained[borders[:-1]] = False
    targets = np.flatnonzero(trained)
    labels = torch.from_numpy(ids[targets])
    cu_seq_lens = torch.from_numpy(borders.astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        "logits_to_keep": torch.from_numpy(targets - 1),
        "labels": labels,
        "shift_labels": labels,
    }

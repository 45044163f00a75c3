"""The one batch layout: the rows of a micro-batch behind one another, without padding."""

from collections.abc import Sequence

import numpy as np
import torch

from recipe.data.openings import Opened, shared_openings
from recipe.data.tokens import TokenizedRow

# Raised when the tokens of a micro-batch become others: dropout then draws other masks, and a run
# that began with the layout before is not continued unless --allow-changed says so.
LAYOUT = 2
IGNORED = -100  # cross_entropy's ignore_index, and what the Trainer does not count
# The gradient of the kept logits is summed over the whole vocabulary by a matrix product with K
# rows. MKL sums some small or odd K plainly, and a row of three trained tokens then loses more than
# a digit against stock code: without this, the slow test in tests/equalities/test_gradients.py
# fails for 1x8.
# A GPU's matrix units want multiples of 8 as well.
KEPT_MULTIPLE = 8

Batch = dict[str, torch.Tensor | int | list[int]]


def flatten(rows: Sequence[TokenizedRow], *, share_openings: bool = False) -> Batch:
    """Lay rows into one sequence of T = t1 + t2 + … tokens.

    t1, t2, … are each row's tokens up to the one that predicts its last trained token; where
    openings are shared, without those that the row before begins with as well. Positions count
    within the row. Logits are asked for only where the next token is trained: K positions. The row
    borders carry the names that transformers gives them for variable-length attention.

    No rows at all, as where processes outnumber the micro-batches that are left, become one token
    that trains nothing: every process must take part in every step.

    Args:
        share_openings: lay the ids that rows begin with in common once, where that pays; see
            ``recipe.data.openings``. The rows are then sorted, and only an attention that reads
            ``openings`` understands the batch.

    Returns:
        ``input_ids``, ``position_ids``: int64 (1, T);
        ``cu_seq_lens_q``, ``cu_seq_lens_k``: int32 (rows + 1), where each row begins and T;
        ``max_length_q``, ``max_length_k``: int, the largest of t1, t2, …;
        ``row_lengths``: list of int, t1, t2, …; on the host, so that no kernel launch waits for it;
        ``openings``: list of int, for each row how many tokens of the row before come before its
        own; all 0 where nothing is shared;
        ``endings``: list of int, how many tokens behind each row's own are left out;
        ``row_indices``: list of int, each row's ``index``; the Trainer takes them off for what it
        has to say of these rows, and no model sees them;
        ``logits_to_keep``: int64 (K,), positions whose next token is trained, filled up to a
        multiple of ``KEPT_MULTIPLE`` with position 0;
        ``predicting``: int64 (P,), the positions whose next token is trained, in order and not
        filled up;
        ``labels``, ``shift_labels``: int64 (K,), the tokens those positions must predict, and
        ``IGNORED`` where filled up. The Trainer counts ``shift_labels`` as they are; from
        ``labels`` alone it would drop the first of each micro-batch, and the mean over the
        accumulated batch would silently be wrong.
    """
    if not rows:
        return _nothing()
    opened = shared_openings(rows) if share_openings else None
    laid = opened or [Opened(row, 0) for row in rows]
    lengths = np.array([one.row.needed - one.opening for one in laid])
    borders = np.concatenate([[0], lengths.cumsum()])
    own = [slice(one.opening, one.row.needed) for one in laid]
    ids = np.concatenate([one.row.input_ids[part] for one, part in zip(laid, own, strict=True)])
    # Of what is predicted, no position lies in an opening.
    predicting = np.concatenate(
        [
            start - one.opening + one.row.predicting
            for one, start in zip(laid, borders, strict=False)
        ]
    )
    targets = np.concatenate([one.row.input_ids[one.row.predicting + 1] for one in laid])
    kept = np.zeros(-len(predicting) % KEPT_MULTIPLE + len(predicting), dtype=np.int64)
    kept[: len(predicting)] = predicting
    labels = torch.full((len(kept),), IGNORED)
    labels[: len(targets)] = torch.from_numpy(targets)
    positions = np.concatenate([np.arange(part.start, part.stop) for part in own])
    cu_seq_lens = torch.from_numpy(borders.astype(np.int32))
    longest = int(lengths.max())
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
        "row_lengths": lengths.tolist(),
        "openings": [one.opening for one in laid],
        "endings": [len(one.row) - one.row.needed for one in laid],
        "row_indices": [one.row.index for one in laid],
        "logits_to_keep": torch.from_numpy(kept),
        "predicting": torch.from_numpy(predicting),
        "labels": labels,
        "shift_labels": labels,
    }


def _nothing() -> Batch:
    borders = torch.tensor([0, 1], dtype=torch.int32)
    labels = torch.full((KEPT_MULTIPLE,), IGNORED)
    return {
        "input_ids": torch.zeros(1, 1, dtype=torch.int64),
        "position_ids": torch.zeros(1, 1, dtype=torch.int64),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": 1,
        "max_length_k": 1,
        "row_lengths": [1],
        "openings": [0],
        "endings": [0],
        "row_indices": [],
        "logits_to_keep": torch.zeros(KEPT_MULTIPLE, dtype=torch.int64),
        "predicting": torch.zeros(0, dtype=torch.int64),
        "labels": labels,
        "shift_labels": labels,
    }


def largest_batch(rows: Sequence[TokenizedRow], size: int) -> Sequence[TokenizedRow]:
    """Of ``rows`` dealt in their order, ``size`` at a time, those that need the most tokens."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return max(batches, key=lambda batch: sum(row.needed for row in batch), default=[])

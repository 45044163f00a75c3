"""``loss.png``: a function of ``metrics.jsonl``."""

import json
from pathlib import Path


def plot_loss(metrics: Path, picture: Path, *, title: str) -> None:
    """Draw training loss by step, its mean by epoch and the held-out loss."""
    import matplotlib  # here, as a run's start need not wait for it

    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (
        ("loss", "training, by step", {"color": "#9ecae1", "linewidth": 1}),
        ("epoch_loss", "training, mean of the epoch", {"color": "#08519c", "marker": "o"}),
        ("eval_loss", "held out", {"color": "#d94801", "marker": "s"}),
    ):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss (nats a trained token)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)

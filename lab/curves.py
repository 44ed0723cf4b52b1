"""The picture of a run: `train.py` asks for it by name when a run ends."""

import json
from pathlib import Path

from matplotlib.figure import Figure

PLOTS = "reward dev_accuracy turns tool_shares tool_error_rate entropy kl grad_norm".split()


def plot_curves(run: Path) -> None:
    """curves.png: figures of metrics.jsonl over the steps."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    figure = Figure(figsize=(14, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 4).flat, PLOTS):
        if not (points := [(m["step"], m[name]) for m in lines if name in m]):
            continue
        steps, values = zip(*points)
        if name == "tool_shares":
            axis.plot(steps, [list(shares.values()) for shares in values], label=list(values[0]))
            axis.legend()
        else:
            axis.plot(steps, values, ".-")
        axis.set(title=name.replace("_", " "), xlabel="step", ylim=(0, None))
    figure.savefig(run / "curves.png")

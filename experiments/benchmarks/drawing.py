"""The picture of a comparison: hypervolume against evaluations in each space, and which mean ranks differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ranking import Curve, cliques, sampled

#: Colours that remain apart for the colour-blind (Okabe, Ito 2008), then greys; styles tell the rest apart.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"),
    *("#56B4E9", "#000000", "#8B5A2B", "#6A3D9A", "#999999"),
)


def draw(
    curves: Mapping[str, Mapping[str, Sequence[Curve]]],
    best: Mapping[str, float],
    titles: Mapping[str, str],
    order: Mapping[str, float],
    difference: float,
    path: Path,
    budget: int,
) -> None:
    """Draw one panel a space and a diagram of critical differences.

    Args:
        curves: of every run, by space and contender.
        best: the best known hypervolume by space.
        titles: of the panels.
        order: mean ranks by contender.
        difference: the critical difference.
        path: of the picture; its suffix decides the format.
        budget: to how many evaluations curves are drawn.
    """
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams.update({"svg.hashsalt": "evomerge", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
    mpl.rcParams.update({"axes.spines.right": False, "legend.frameon": False})
    import matplotlib.pyplot as plt

    names = sorted(order, key=lambda name: order[name])
    figure = plt.figure(figsize=(4.4 * len(curves), 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2.2, 1.0))
    panels = above.subplots(1, len(curves), squeeze=False)[0]
    for panel, space in zip(panels, curves, strict=True):
        _panel(panel, curves[space], best[space], names, budget)
        panel.set_title(titles[space], fontsize=9)
    panels[0].set_ylabel("share of the best known hypervolume")
    handles, labels = panels[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)), fontsize=8)
    _ranks(below.subplots(), order, difference)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def style(place: int) -> dict[str, Any]:
    """Return colour and dashes of the contender at a place of the order."""
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": ("-", "--", ":")[place // len(_COLOURS) % 3]}


def _panel(panel: Any, curves: Mapping[str, Sequence[Curve]], best: float, names: Sequence[str], budget: int) -> None:
    grid = np.unique(np.rint(np.geomspace(13, budget, 160)).astype(int))
    for place, name in enumerate(names):
        if name not in curves:
            continue
        shares = np.array([sampled(curve, grid.tolist()) for curve in curves[name]]) / best
        low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75), axis=0)
        panel.plot(grid, middle, label=name, linewidth=1.5, **style(place))
        panel.fill_between(grid, low, high, color=style(place)["color"], alpha=0.12, linewidth=0)
    panel.axhline(0.95, color="#666666", linewidth=0.7, linestyle=(0, (1, 2)))
    panel.set_xscale("log")
    panel.set_xlim(13, budget)
    ticks = [tick for tick in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if tick <= budget]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(0.5, 1.0)
    panel.set_xlabel("evaluations, baselines included")


def _ranks(panel: Any, order: Mapping[str, float], difference: float) -> None:
    """Draw mean ranks on a line, names at both sides, and bars over those that are not told apart (Demsar 2006)."""
    names = sorted(order, key=lambda name: order[name])
    means = [order[name] for name in names]
    count, half = len(names), (len(names) + 1) // 2
    low, high = 1, count
    bars = cliques(means, difference)
    top = -0.5 - 0.35 * len(bars)
    panel.set_xlim(low - 0.22 * count, high + 0.22 * count)
    panel.set_ylim(top - 0.75 * half - 0.3, 1.9)
    panel.axis("off")
    panel.plot([low, high], [0, 0], color="black", linewidth=1)
    for tick in range(low, high + 1):
        panel.plot([tick, tick], [0, 0.18], color="black", linewidth=1)
        panel.text(tick, 0.3, str(tick), ha="center", va="bottom", fontsize=8)
    panel.plot([low, low + difference], [1.35, 1.35], color="black", linewidth=2)
    text = f"critical difference {difference:.2f}"
    panel.text(low + difference + 0.1, 1.35, text, ha="left", va="center", fontsize=8)
    panel.text(high, 1.35, "mean rank; 1 is best", ha="right", va="center", fontsize=8)
    for place, (name, mean) in enumerate(zip(names, means, strict=True)):
        left = place < half
        height = top - 0.75 * (place if left else count - 1 - place)
        side = low - 0.1 if left else high + 0.1
        panel.plot([mean, mean, side], [0, height, height], color=style(place)["color"], linewidth=0.9)
        panel.text(
            side, height, f"{name} {mean:.1f} " if left else f" {mean:.1f} {name}",
            ha="right" if left else "left", va="center", fontsize=8.5,
        )  # fmt: skip
    for row, (first, last) in enumerate(bars):
        ends = [means[first] - 0.05, means[last] + 0.05]
        panel.plot(ends, [-0.35 - 0.35 * row] * 2, color="black", linewidth=3, solid_capstyle="butt")

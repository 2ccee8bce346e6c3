"""Attention maps as a picture of all heads, and as a page with one head at a time.  T tokens."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from tinygpt.files import atomic_write
from tinygpt.report.plots import NO_DATE, STYLE

MOST_LABELS = 16  # tokens that can be read at the axes of a small map
PAGE = Path(__file__).with_suffix(".html")


def plot_attention(maps: NDArray[np.float32], tokens: Sequence[str], path: Path) -> None:
    """A row of small maps for each layer; darker is more.  (n_layer, n_head, T, T)

    The file's name says whether it is SVG or PNG.
    """
    n_layer, n_head = maps.shape[:2]
    with mpl.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure = Figure(figsize=(1.2 + 1.8 * n_head, 0.6 + 1.8 * n_layer), layout="constrained")
        axes = figure.subplots(n_layer, n_head, squeeze=False, sharex=True, sharey=True)
        for (layer, head), axis in np.ndenumerate(axes):
            image = axis.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"layer {layer}, head {head}", fontsize=7)
            if len(tokens) <= MOST_LABELS:
                axis.set_xticks(range(len(tokens)), tokens, rotation=90)
                axis.set_yticks(range(len(tokens)), tokens)
            else:
                axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.supxlabel("token that is looked at")
        figure.supylabel("token that looks")
        figure.colorbar(image, ax=axes, shrink=0.6, label="weight")
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=120, metadata=NO_DATE[path.suffix[1:]])


def attention_page(maps: NDArray[np.float32], tokens: Sequence[str], path: Path) -> None:
    """A page that needs no other file: choose layer and head, point at a token.  (n_layer, n_head, T, T)"""
    data = {"tokens": list(tokens), "maps": np.round(maps, 3).tolist()}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no token ends the script
    page = PAGE.read_text(encoding="utf-8").replace("{{title}}", html.escape("".join(tokens)[:80]))
    with atomic_write(path) as file:
        file.write(page.replace("{{data}}", text))

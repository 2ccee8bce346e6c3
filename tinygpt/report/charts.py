"""Charts of a run in Vega-Lite (https://vega.github.io/vega-lite), the language of DVC's plots.

html/page.js replaces what begins with $ when it draws: $x is the column of the x axis, $xscale and $yscale are linear
or log, colours are for a light or a dark page. Colours are Okabe and Ito's, and lines differ in style as well.
"""

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]

STEPS = ["step", "tokens", "epochs"]  # columns for the x axis
SHOWN = {  # column -> its name in the tooltip, and its format
    "step": ("step", ","),
    "tokens": ("tokens", ","),
    "epochs": ("epochs", ".2f"),
    "train": ("train loss", ".4f"),
    "val": ("validation loss", ".4f"),
    "seen": ("validation loss", ".4f"),
    "lr": ("learning rate", ".2e"),
    "grad_norm": ("gradient norm", ".3f"),
    "norm": ("norm", ".3g"),
    "share": ("of the text", ".1%"),
}
X: Spec = {
    "field": "$x",
    "type": "quantitative",
    "title": "$x",
    "scale": {"type": "$xscale", "nice": False, "zero": "$xzero"},
    "axis": {"labelExpr": "format(datum.value, datum.value < 1e4 ? ',' : '~s')", "tickCount": 6, "labelOverlap": True},
}
NEAREST: Spec = {  # the row under the pointer
    "name": "hover",
    "select": {"type": "point", "fields": ["$x"], "nearest": True, "on": "pointerover", "clear": "pointerout"},
}


def charts(n_parts: int, steps: Sequence[str]) -> dict[str, Spec]:
    """The charts of the page by name, for a model of `n_parts` parts that each have a gradient norm.

    `steps` are those of STEPS that the curve has.
    """
    return {
        "loss": loss_chart(steps),
        "rate": line_chart("lr", "learning rate", "linear"),
        "norm": line_chart("grad_norm", "gradient norm, before clipping", "log"),
        "parts": parts_chart(n_parts),
        "lengths": lengths_chart(),
    }


def number(field: str, title: str | None = None, **more: Any) -> Spec:
    """The encoding of a column of numbers."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def shown(*fields: str) -> list[Spec]:
    """The tooltip for these columns."""
    return [number(field, SHOWN[field][0], format=SHOWN[field][1]) for field in fields]


def chart(height: int, *layers: Spec, data: str = "curve", **more: Any) -> Spec:
    """Layers drawn from one of the page's tables, one over the other, as wide as the page allows."""
    return {"data": {"name": data}, "width": "container", "height": height, "layer": list(layers), **more}


def drawn(mark: str, y: Spec, more: Spec | None = None, *, where: str = "", **style: Any) -> Spec:
    """One layer: a column of the curve over x, in the rows where it has a value, or where `where` holds."""
    return {
        "transform": [{"filter": where or f"isValid(datum.{y['field']})"}],
        "mark": {"type": mark, **style},
        "encoding": {"x": X, "y": y, **(more or {})},
    }


def loss(field: str) -> Spec:
    """The encoding of a loss."""
    return number(field, "nats per token", scale={"type": "$yscale", "zero": "$yzero"})


def pointer(*fields: str) -> Spec:
    """A vertical line at the pointer, with a tooltip of these columns."""
    opacity = {"condition": {"param": "hover", "empty": False, "value": 0.6}, "value": 0}
    encoding = {"x": X, "opacity": opacity, "tooltip": shown(*fields)}
    return {"params": [NEAREST], "mark": {"type": "rule", "color": "$ink"}, "encoding": encoding}


def loss_chart(steps: Sequence[str]) -> Spec:
    """Training and validation loss, with the best one marked."""

    def named(name: str) -> Spec:
        legend = {"orient": "top", "title": None, "symbolType": "stroke", "symbolSize": 300}
        ranges = {"color": ["$blue", "$orange"], "strokeDash": [[1, 0], [5, 3]]}
        scales = {key: {"domain": ["train", "validation"], "range": values} for key, values in ranges.items()}
        return {key: {"datum": name, "scale": scale, "legend": legend} for key, scale in scales.items()}

    best: Spec = {"where": "datum.best", "color": "$green"}
    return chart(
        300,
        drawn("line", loss("train"), opacity=0.25, color="$blue"),
        drawn("line", loss("smooth"), named("train"), strokeWidth=2),
        drawn("line", loss("val"), named("validation"), strokeWidth=2, point={"size": 35, "color": "$orange"}),
        drawn("point", loss("val"), shape="diamond", filled=True, size=150, **best),
        drawn("text", loss("val"), {"text": {"field": "best"}}, dy=-14, align="right", fontWeight=600, **best),
        pointer("train", "seen", *steps),
    )


def comparison_chart(names: Sequence[str]) -> Spec:
    """The losses of several runs, validation with points; the page lists their names, and dims curves."""
    colours, styles = zip(*run_styles(names), strict=True)
    ranges = {"color": colours, "strokeDash": [[1, 0] if style == "solid" else [6, 3] for style in styles]}
    encoding: Spec = {
        channel: {"field": "name", "type": "nominal", "scale": {"domain": names, "range": values}, "legend": None}
        for channel, values in ranges.items()
    }
    encoding["opacity"] = {"condition": {"test": "datum.dim", "value": 0.1}, "value": 1}
    encoding["tooltip"] = [{"field": "name"}, *shown("step", "tokens", "train", "val")]
    return chart(
        380,
        drawn("line", loss("smooth"), encoding, strokeWidth=1),
        drawn("line", loss("val"), encoding, strokeWidth=2, point={"size": 45}, tooltip=True),
    )


def run_styles(names: Sequence[object]) -> list[tuple[str, str]]:
    """A colour and a line style for each run: fourteen before they repeat."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "$ink"]
    return [(colours[at % 7], ("solid", "dashed")[at // 7 % 2]) for at in range(len(names))]


def line_chart(field: str, title: str, scale: str) -> Spec:
    """One column of the curve."""
    y = number(field, scale={"type": scale}, axis={"tickCount": 4, "grid": scale == "linear"})
    return chart(130, drawn("line", y, strokeWidth=1.5, color="$blue"), pointer(field, "step"), title=title)


def parts_chart(n_parts: int) -> Spec:
    """The gradient's norm by part and step: lighter is larger, on a scale that colour-blind people can read."""
    encoding = {
        "x": {"field": "step", "type": "ordinal", "axis": {"labelOverlap": True, "labelAngle": 0}},
        "y": {"field": "part", "type": "nominal", "sort": None, "title": None},
        "color": number("norm", scale={"type": "log", "scheme": "cividis"}),
        "tooltip": [{"field": "part"}, *shown("step", "norm")],
    }
    mark = {"mark": {"type": "rect", "tooltip": True}, "encoding": encoding}
    positive = [{"filter": "datum.norm > 0"}]  # zero has no logarithm
    return chart(18 * n_parts, mark, data="norms", transform=positive, title="gradient norm by part")


def lengths_chart() -> Spec:
    """The share of the text in tokens of each length in bytes."""
    in_vocabulary = number("tokens", "tokens of the vocabulary", format=",")
    encoding = {
        "x": {"field": "label", "type": "ordinal", "sort": None, "title": "bytes", "axis": {"labelAngle": 0}},
        "y": number("share", axis={"format": "%", "tickCount": 4}),
        "tooltip": [{"field": "bytes", "title": "bytes"}, *shown("share"), in_vocabulary],
    }
    mark = {"mark": {"type": "bar", "color": "$blue", "tooltip": True}, "encoding": encoding}
    return chart(150, mark, data="lengths", title="share of the text by length of its tokens")

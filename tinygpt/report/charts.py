"""Charts of a run, in Vega-Lite (https://vega.github.io/vega-lite), as DVC's plots are.

What begins with $ is put in by html/page.js when it draws: $x is the column of the axis, $xscale and $yscale are linear
or log, colours are those of light or dark pages. Colours are Okabe and Ito's, and lines differ in style as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]

STEPS = ["step", "tokens", "epochs"]  # what x can be
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

POINTED = [
    ("step", ",", "step"),
    ("tokens", ",", "tokens"),
    ("train", ".4f", "train loss"),
    ("val", ".4f", "validation loss"),
]


def charts(n_parts: int) -> dict[str, Spec]:
    """Each chart of the page by name, of a model of so many parts with a gradient norm of their own."""
    return {
        "loss": loss_chart(),
        "rate": line_chart("lr", "learning rate", "linear", ".2e"),
        "norm": line_chart("grad_norm", "gradient norm, before clipping", "log", ".3f"),
        "parts": parts_chart(n_parts),
        "lengths": lengths_chart(),
    }


def loss_chart() -> Spec:
    """Training and validation loss, the best one marked."""
    styles: Spec = {
        "color": {"domain": ["train", "validation"], "range": ["$blue", "$orange"]},
        "strokeDash": {"domain": ["train", "validation"], "range": [[1, 0], [5, 3]]},
    }

    def styled(name: str) -> Spec:
        legend = {"orient": "top", "title": None, "symbolType": "stroke", "symbolSize": 300}
        return {key: {"datum": name, "scale": scale, "legend": legend} for key, scale in styles.items()}

    def encoded(field: str, **more: Any) -> Spec:
        scale = {"type": "$yscale", "zero": "$yzero"}
        return {
            "x": X,
            "y": {"field": field, "type": "quantitative", "title": "nats per token", "scale": scale},
            **more,
        }

    return chart(
        300,
        {"mark": {"type": "line", "opacity": 0.25, "color": "$blue"}, "encoding": encoded("train")},
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": encoded("smooth", **styled("train"))},
        {
            "transform": [{"filter": "isValid(datum.val)"}],
            "mark": {"type": "line", "strokeWidth": 2, "point": {"size": 35, "color": "$orange"}},
            "encoding": encoded("val", **styled("validation")),
        },
        {
            "transform": [{"filter": "datum.best"}],
            "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 150, "color": "$green"},
            "encoding": encoded("val"),
        },
        {
            "transform": [{"filter": "datum.best"}],
            "mark": {"type": "text", "dy": -14, "align": "right", "fontWeight": 600, "color": "$green"},
            "encoding": encoded("val", text={"field": "best"}),
        },
        pointer({"train": ".4f", "seen": ".4f", "step": ",", "tokens": ",", "epochs": ".2f"}),
    )


def comparison_chart(names: Sequence[str]) -> Spec:
    """The losses of several runs, validation with points; the page has the names, and says whose curves are dim."""
    shown = [{"field": field, "format": form, "title": title, "type": "quantitative"} for field, form, title in POINTED]
    shared: Spec = {
        "color": {"range": [colour for colour, _ in run_styles(names)]},
        "strokeDash": {"range": [[1, 0] if style == "solid" else [6, 3] for _, style in run_styles(names)]},
    }
    for channel, scale in shared.items():
        scale = {"domain": list(names), **scale}
        shared[channel] = {"field": "name", "type": "nominal", "scale": scale, "legend": None}

    def drawn(field: str, mark: Spec) -> Spec:
        y: Spec = {"field": field, "type": "quantitative", "title": "nats per token"}
        y["scale"] = {"type": "$yscale", "zero": "$yzero"}
        encoding = {"x": X, "y": y, **shared, "tooltip": [{"field": "name"}, *shown]}
        encoding["opacity"] = {"condition": {"test": "datum.dim", "value": 0.1}, "value": 1}
        return {"transform": [{"filter": f"isValid(datum.{field})"}], "mark": mark, "encoding": encoding}

    validation = {"type": "line", "strokeWidth": 2, "point": {"size": 45}, "tooltip": True}
    return chart(380, drawn("smooth", {"type": "line", "strokeWidth": 1}), drawn("val", validation))


def run_styles(names: Sequence[object]) -> list[tuple[str, str]]:
    """A colour and a style of line for each run: fourteen before they repeat."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "$ink"]
    return [(colours[at % 7], ("solid", "dashed")[at // 7 % 2]) for at in range(len(names))]


def line_chart(field: str, title: str, scale: str, form: str) -> Spec:
    """One column of the curve."""
    y: Spec = {"field": field, "type": "quantitative", "title": None, "scale": {"type": scale}}
    y["axis"] = {"tickCount": 4, "grid": scale == "linear"}
    mark = {"type": "line", "strokeWidth": 1.5, "color": "$blue"}
    drawn = {"transform": [{"filter": f"isValid(datum.{field})"}], "mark": mark, "encoding": {"x": X, "y": y}}
    return chart(130, drawn, pointer({field: form, "step": ","})) | {"title": title}


def chart(height: int, *layers: Spec) -> Spec:
    """Layers over each other, as wide as the page lets them be, of the run's curve."""
    return {"data": {"name": "curve"}, "width": "container", "height": height, "layer": list(layers)}


def pointer(forms: dict[str, str]) -> Spec:
    """The rule at the pointer, and the values that it shows: fields with their forms."""
    titles = {"train": "train loss", "seen": "validation loss", "lr": "learning rate", "grad_norm": "gradient norm"}
    shown = [
        {"field": name, "format": form, "title": titles.get(name, name), "type": "quantitative"}
        for name, form in forms.items()
    ]
    opacity = {"condition": {"param": "hover", "empty": False, "value": 0.6}, "value": 0}
    mark = {"type": "rule", "color": "$ink"}
    return {"params": [NEAREST], "mark": mark, "encoding": {"x": X, "opacity": opacity, "tooltip": shown}}


def parts_chart(n_parts: int) -> Spec:
    """The gradient's norm by part and step: lighter is larger, on a scale that colour-blind people can read."""
    color = {"field": "norm", "type": "quantitative", "title": None, "scale": {"type": "log", "scheme": "cividis"}}
    shown = [
        {"field": "part"},
        {"field": "step", "format": ","},
        {"field": "norm", "format": ".3g", "type": "quantitative"},
    ]
    return {
        "title": "gradient norm by part",
        "data": {"name": "norms"},
        "transform": [{"filter": "datum.norm > 0"}],
        "width": "container",
        "height": 18 * n_parts,
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {"field": "step", "type": "ordinal", "axis": {"labelOverlap": True, "labelAngle": 0}},
            "y": {"field": "part", "type": "nominal", "sort": None, "title": None},
            "color": color,
            "tooltip": shown,
        },
    }


def lengths_chart() -> Spec:
    """How much of the text is in tokens of how many bytes."""
    shown = [
        {"field": "bytes", "title": "bytes"},
        {"field": "share", "format": ".1%", "title": "of the text", "type": "quantitative"},
        {"field": "tokens", "format": ",", "title": "tokens of the vocabulary", "type": "quantitative"},
    ]
    return {
        "title": "share of the text in tokens of so many bytes",
        "data": {"name": "lengths"},
        "width": "container",
        "height": 150,
        "mark": {"type": "bar", "color": "$blue", "tooltip": True},
        "encoding": {
            "x": {"field": "label", "type": "ordinal", "sort": None, "title": "bytes", "axis": {"labelAngle": 0}},
            "y": {"field": "share", "type": "quantitative", "title": None, "axis": {"format": "%", "tickCount": 4}},
            "tooltip": shown,
        },
    }

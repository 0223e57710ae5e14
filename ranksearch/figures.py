"""Pictures of a study: the Pareto front (interactive and as PNG) and a plan along the model's depth.

Rows are mappings keyed by the front's columns: `accuracy_drop`, `latency_ratio`, `model_bytes`, `summary`, `origin` ...
"""

import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ranksearch.pareto import REFERENCE_POINT, non_dominated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from plotly.graph_objects import Figure

Row = Mapping[str, object]

# The origin of plans that a user has without any search begins so.
CONTROL = "control"
DENSE_ORIGIN = f"{CONTROL}: dense"


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One scatter: its horizontal axis and the columns that bound the interval there, if any."""

    x: str
    label: str
    low: str | None = None
    high: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """How one kind of plan is drawn, by plotly and by matplotlib."""

    label: str
    symbol: str
    mpl: Literal["*", "D", "o"]
    size: int
    opacity: float


PANELS = (
    Panel(x="latency_ratio", label="latency, plan over dense", low="ratio_low", high="ratio_high"),
    Panel(x="model_bytes", label="size of the weights, MB", scale=1e-6),
)
MARKERS = {
    "trial": Marker(label="trial", symbol="circle", mpl="o", size=7, opacity=0.45),
    "control": Marker(label="control (no search)", symbol="diamond", mpl="D", size=10, opacity=1.0),
    "front": Marker(label="Pareto front", symbol="circle", mpl="o", size=12, opacity=1.0),
    "dense": Marker(label="dense", symbol="star", mpl="*", size=17, opacity=1.0),
}
DROP_LABEL = "drop, dense minus plan (score units)"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPanel:
    """One row of bars along the depth, dense's behind where there are any."""

    column: str
    label: str
    dense: str | None = None
    scale: float = 1.0
    logarithmic: bool = False


LAYER_PANELS = (
    LayerPanel(column="ms", label="ms", dense="dense_ms"),
    LayerPanel(column="bytes", label="kB", dense="dense_bytes", scale=1e-3),
    LayerPanel(column="predicted_loss", label="predicted loss", logarithmic=True),
)
# One colour for each decomposition, the same in every picture.
DECOMPOSITION_COLOURS = {
    "none": "#8a97a5", "svd": "#1f6fd1", "spatial_svd": "#e3720b", "tucker2": "#2c9f5f", "cp": "#b8336a",
    "tensor_train": "#7a4fbf", "depthwise_separable": "#c9a227", "blueprint_separable": "#5f7d2e",
    "grouped_svd": "#1aa3a8", "harmonic": "#8c5a3c",
}  # fmt: skip
OWN_COLOUR = "#333333"


def number(row: Row, column: str) -> float | None:
    """A row's number in `column`; None where it is missing, not a number, or not finite."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None


def is_control(row: Row) -> bool:
    """Whether the row is a plan that a user has without any search."""
    return str(row.get("origin", "")).startswith(CONTROL)


def kind(row: Row) -> str:
    """The marker's name of a row: dense, control, front or trial."""
    tests: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("dense", lambda: row.get("origin") == DENSE_ORIGIN),
        ("control", lambda: is_control(row)),
        ("front", lambda: bool(row.get("pareto"))),
    )
    return next((name for name, test in tests if test()), "trial")


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have what the picture shows: drop, latency ratio and size."""
    wanted = ("accuracy_drop", "latency_ratio", "model_bytes")
    return [row for row in rows if all(number(row, column) is not None for column in wanted)]


def pareto_figure(rows: Sequence[Row], title: str = "Pareto front") -> "Figure":
    """Drop against latency and against size, both in powers, coloured by size; lower left is better.

    Dense and the controls have their own markers, whiskers are the intervals at 95 %, hovering tells the summary.
    Rows without a drop (stopped before their accuracy was measured), and ruined ones above its upper edge,
    are counted in the title.
    """
    from plotly.subplots import make_subplots

    shown = measured(rows)
    figure = make_subplots(rows=1, cols=len(PANELS), shared_yaxes=True, horizontal_spacing=0.04)
    for column, panel in enumerate(PANELS, start=1):
        figure.add_trace(_staircase_trace(shown, panel, legend=column == 1), row=1, col=column)
        for name in MARKERS:
            chosen = [row for row in shown if kind(row) == name]
            if chosen:
                figure.add_trace(_points_trace(chosen, name, panel, legend=column == 1), row=1, col=column)
        figure.update_xaxes(title_text=panel.label, type="log", dtick="D2", row=1, col=column)
    figure.update_yaxes(title_text=DROP_LABEL, row=1, col=1)
    if (drops := _shown_drops(shown)) is not None:
        figure.update_yaxes(range=drops)
    figure.update_layout(
        title={"text": _title(_plain(title), rows, shown)},
        template="plotly_white",
        coloraxis={"colorscale": "Viridis", "colorbar": {"title": {"text": "MB"}}},
        legend={"orientation": "h", "y": -0.18},
        margin={"l": 70, "r": 30, "t": 70, "b": 80},
    )
    return figure


def figure_html(figure: "Figure", with_plotly: bool = True, *, full: bool = False) -> str:
    """A figure as HTML that asks for nothing outside itself; plotly's library is 5 MB; `full` makes a whole page."""
    # plotly shows a button that uploads the chart; a study's figures are nobody else's.
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False, "plotlyServerURL": ""}
    # A height of its own: inside MLflow's frame there is none to take a share of.
    height = figure.layout.height or 680
    page = figure.to_html(include_plotlyjs=with_plotly, full_html=full, config=config, default_height=f"{height}px")
    return str(page)


def pareto_png(rows: Sequence[Row], title: str = "Pareto front") -> bytes:
    """The same picture as PNG, 1400 x 600 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as StaticFigure

    shown = measured(rows)
    # Without pyplot: no global state, no display, safe beside a user's own plots.
    figure = StaticFigure(figsize=(14, 6), dpi=100, layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for panel, axis in zip(PANELS, axes, strict=True):
        _draw_panel(axis, shown, panel)
    axes[0].set_ylabel(DROP_LABEL)
    if (drops := _shown_drops(shown)) is not None:
        axes[0].set_ylim(*drops)
    if shown:
        axes[0].legend(loc="upper right", fontsize=9)
    figure.suptitle(_title(title, rows, shown).replace("<br>", "\n"))
    content = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(content, format="png")
    return content.getvalue()


def layers_figure(layers: Sequence[Row], title: str = "Layers") -> "Figure":
    """A plan along the depth: for each layer its time and bytes beside dense's, and its predicted loss.

    `layers` are rows with `layer`, `choice` (the label), `decomposition` and, where known, `dense_ms`, `ms`,
    `dense_bytes`, `bytes` and `predicted_loss`, first layer first. What no row knows is left out.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    places = list(range(len(layers)))
    panels = [panel for panel in LAYER_PANELS if any(number(layer, panel.column) is not None for layer in layers)]
    figure = make_subplots(rows=max(len(panels), 1), cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for row, panel in enumerate(panels, start=1):
        if panel.dense is not None:
            dense = _values(layers, panel.dense, panel.scale)
            style = {"color": "#d7dee6"}
            bars = go.Bar(
                x=places, y=dense, width=0.8, name="dense", marker=style, hoverinfo="skip", showlegend=row == 1
            )
            figure.add_trace(bars, row=row, col=1)
        for name in dict.fromkeys(str(layer.get("decomposition", "none")) for layer in layers):
            chosen = [i for i in places if str(layers[i].get("decomposition", "none")) == name]
            figure.add_trace(_layer_bars(layers, chosen, name, panel, legend=row == 1), row=row, col=1)
        figure.update_yaxes(title_text=panel.label, row=row, col=1, type="log" if panel.logarithmic else "linear")
    names = [
        _plain(layer["layer"]) + (f"<br>{_plain(layer.get('choice', ''))}" if len(layers) <= 24 else "")
        for layer in layers
    ]
    figure.update_xaxes(tickmode="array", tickvals=places, ticktext=names, row=max(len(panels), 1), col=1)
    figure.update_layout(
        title={"text": _plain(title)},
        template="plotly_white",
        barmode="overlay",
        height=240 * max(len(panels), 1) + 200,
        legend={"orientation": "h", "y": 1.04},
        margin={"l": 70, "r": 30, "t": 90, "b": 120},
    )
    return figure


def _layer_bars(layers: Sequence[Row], places: Sequence[int], name: str, panel: LayerPanel, legend: bool) -> Any:
    """The bars of the layers of one decomposition."""
    import plotly.graph_objects as go

    rows = [layers[i] for i in places]
    return go.Bar(
        x=list(places),
        y=_values(rows, panel.column, panel.scale),
        # Else a lone bar fills the gap to the next of its kind.
        width=0.8,
        name=_plain(name),
        legendgroup=_plain(name),
        showlegend=legend,
        marker={"color": DECOMPOSITION_COLOURS.get(name, OWN_COLOUR)},
        customdata=[[_plain(row.get(column, "")) for column in ("layer", "choice", "why")] for row in rows],
        hovertemplate="<b>%{customdata[0]}</b><br>%{customdata[1]}<br>%{customdata[2]}<br>"
        + panel.label
        + " %{y:.3g}<extra></extra>",
    )


def _title(title: str, rows: Sequence[Row], shown: Sequence[Row]) -> str:
    """The title with what is shown and what is left out."""
    n_front = sum(bool(row.get("pareto")) for row in shown)
    n_hidden = len(rows) - len(shown)
    hidden = f"; {n_hidden} stopped before their accuracy was measured" if n_hidden else ""
    drops = _shown_drops(shown)
    n_above = 0 if drops is None else sum((number(row, "accuracy_drop") or 0.0) > drops[1] for row in shown)
    above = f"; {n_above} lose more than is shown" if n_above else ""
    return f"{title}<br>{len(shown)} plans, {n_front} on the front{hidden}{above}. Lower left is better."


def _shown_drops(rows: Sequence[Row]) -> list[float] | None:
    """The drops from which to which the picture goes, so that ruined plans do not flatten it; None: it shows all."""
    drops = _values(rows, "accuracy_drop")
    within = [drop for drop in drops if drop <= REFERENCE_POINT[0]]
    if not within or len(within) == len(drops):
        return None
    margin = 0.1 * max(max(within) - min(within), 0.01)
    return [min(within) - margin, max(within) + margin]


def _values(rows: Sequence[Row], column: str, scale: float = 1.0) -> list[float]:
    """The column's numbers, missing ones as NaN."""
    found = (number(row, column) for row in rows)
    return [math.nan if value is None else value * scale for value in found]


def _whiskers(rows: Sequence[Row], middle: str, low: str, high: str) -> tuple[list[float], list[float]]:
    """Lengths below and above the value; zero where a row has no interval."""
    centre, below, above = (np.array(_values(rows, column)) for column in (middle, low, high))
    lengths = np.nan_to_num(np.stack([centre - below, above - centre]), nan=0.0).clip(min=0.0)
    return lengths[0].tolist(), lengths[1].tolist()


def _staircase(rows: Sequence[Row], panel: Panel) -> tuple[list[float], list[float]]:
    """The corners of the best drop at each value of the panel's axis, in axis order."""
    points = np.array([_values(rows, panel.x, panel.scale), _values(rows, "accuracy_drop")]).T.reshape(-1, 2)
    best = points[non_dominated(points)]
    best = best[np.argsort(best[:, 0])]
    return best[:, 0].tolist(), best[:, 1].tolist()


def _staircase_trace(rows: Sequence[Row], panel: Panel, legend: bool) -> Any:
    """The line under which no plan lies in this panel."""
    import plotly.graph_objects as go

    x, y = _staircase(rows, panel)
    style = {"shape": "hv", "dash": "dot", "color": "grey", "width": 1}
    name = "best in this panel"
    return go.Scatter(x=x, y=y, mode="lines", line=style, hoverinfo="skip", name=name, showlegend=legend)


def _points_trace(rows: Sequence[Row], name: str, panel: Panel, legend: bool) -> Any:
    """One kind of plan in one panel."""
    import plotly.graph_objects as go

    marker = MARKERS[name]
    return go.Scatter(
        x=_values(rows, panel.x, panel.scale),
        y=_values(rows, "accuracy_drop"),
        mode="markers",
        name=marker.label,
        legendgroup=name,
        showlegend=legend,
        text=[_hover(row) for row in rows],
        hovertemplate="%{text}<extra></extra>",
        error_y=_error_bar(rows, "accuracy_drop", "drop_low", "drop_high"),
        error_x=_error_bar(rows, panel.x, panel.low, panel.high),
        marker={
            "symbol": marker.symbol,
            "size": marker.size,
            "opacity": marker.opacity,
            "color": _values(rows, "model_bytes", 1e-6),
            "coloraxis": "coloraxis",
            "line": {"width": 1, "color": "black"},
        },
    )


def _error_bar(rows: Sequence[Row], middle: str, low: str | None, high: str | None) -> dict[str, Any] | None:
    """Plotly's description of an interval, thin and pale; None where the axis has none."""
    if low is None or high is None:
        return None
    below, above = _whiskers(rows, middle, low, high)
    return {
        "type": "data",
        "arrayminus": below,
        "array": above,
        "thickness": 0.8,
        "width": 2,
        "color": "rgba(0,0,0,.3)",
    }


def _hover(row: Row) -> str:
    """What hovering over a point tells."""
    trial = number(row, "trial")
    parts = [f"<b>{_plain(row.get('summary', ''))}</b>", _plain(row.get("origin", ""))]
    if trial is not None:
        parts[1] = f"trial {trial:.0f}, {parts[1]}"
    columns = (("accuracy", "accuracy {:.4f}"), ("latency_ms", "{:.3g} ms"), ("bytes_ratio", "{:.0%} of dense's bytes"))
    for column, text in columns:
        value = number(row, column)
        if value is not None:
            parts.append(text.format(value))
    return "<br>".join(parts)


def _plain(value: object) -> str:
    """A text as plotly shows it: it takes some tags for what they are in HTML."""
    return html.escape(str(value), quote=False)


def _draw_panel(axis: "Axes", rows: Sequence[Row], panel: Panel) -> None:
    """One panel of the PNG."""
    from matplotlib.ticker import LogLocator

    x, y = _staircase(rows, panel)
    axis.step(x, y, where="post", linestyle=":", color="grey", linewidth=1)
    sizes = _values(rows, "model_bytes", 1e-6)
    for name, marker in MARKERS.items():
        chosen = [row for row in rows if kind(row) == name]
        if not chosen:
            continue
        points = _values(chosen, panel.x, panel.scale), _values(chosen, "accuracy_drop")
        below, above = _whiskers(chosen, "accuracy_drop", "drop_low", "drop_high")
        axis.errorbar(*points, yerr=(below, above), fmt="none", ecolor="0.75", elinewidth=0.8, zorder=1)
        if panel.low is not None and panel.high is not None:
            sides = _whiskers(chosen, panel.x, panel.low, panel.high)
            axis.errorbar(*points, xerr=sides, fmt="none", ecolor="0.75", elinewidth=0.8, zorder=1)
        axis.scatter(
            *points, c=_values(chosen, "model_bytes", 1e-6), vmin=min(sizes), vmax=max(sizes), cmap="viridis",
            marker=marker.mpl, s=marker.size**2, alpha=marker.opacity, edgecolors="black", label=marker.label, zorder=2,
        )  # fmt: skip
    axis.set_xlabel(panel.label)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)

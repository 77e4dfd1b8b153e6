"""Losses: held out by timestep, and in training by step."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from deme_core.binned_losses import RelativeLosses
from deme_core.html_report.chart_style import NEUTRAL, axis_type, bare, colours, translucent
from deme_core.html_report.content import HeldoutLosses

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST_POINTS = 400
_PANELS = {"diffusion_loss": "diffusion loss", "consistency_loss": "consistency loss"}


def heldout_chart(losses: HeldoutLosses, *, is_copy: frozenset[str] = frozenset()) -> "Figure":
    """Draws the change of the held-out loss by timestep, with 95 % bands over the images, and the segments' borders.

    Args:
        losses: by row or copy.
        is_copy: those that are drawn thin, without a band, and do not decide what range is shown first: far from its
            own segment a copy may be worse by any amount.
    """
    from plotly.graph_objects import Figure

    figure = Figure()
    palette = colours(losses.curves)
    for name, curve in losses.curves.items():
        _draw_curve(figure, name, curve, palette[name], thin=name in is_copy)
    figure.add_hline(y=0, line={"color": NEUTRAL, "width": 1.5})
    for edge in losses.segment_edges[1:-1]:
        figure.add_vline(x=edge, line={"color": NEUTRAL, "width": 1, "dash": "dash"})
    for index, (low, high) in enumerate(itertools.pairwise(losses.segment_edges)):
        figure.add_annotation(
            x=(low + high) / 2, y=0, yref="paper", yanchor="bottom", text=f"segment {index}", showarrow=False
        )
    shown = [curve for name, curve in losses.curves.items() if name not in is_copy]
    figure.update_xaxes(title="timestep (0: least noise)", range=[0, max(c.edges[-1] for c in losses.curves.values())])
    figure.update_yaxes(title="change of the loss, %", range=_range(shown))
    return bare(figure, height=420, hovermode="x unified", margin={"l": 64, "r": 16, "t": 48, "b": 48})


def _draw_curve(figure: "Figure", name: str, curve: RelativeLosses, colour: str, *, thin: bool) -> None:
    middles = [(low + high) / 2 for low, high in itertools.pairwise(curve.edges)]
    means, lows, highs = ([100 * getattr(c, part) for c in curve.changes] for part in ("mean", "low", "high"))
    if not thin:
        figure.add_scatter(
            x=[*middles, *reversed(middles)],
            y=[*highs, *reversed(lows)],
            fill="toself",
            fillcolor=translucent(colour, 0.16),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
    figure.add_scatter(
        x=middles,
        y=means,
        customdata=list(zip(lows, highs, strict=True)),
        mode="lines",
        name=name,
        legendgroup=name,
        line={"color": colour, "width": 1.5 if thin else 2.5, "dash": "dot" if thin else "solid"},
        hovertemplate="%{y:+.2f} % (%{customdata[0]:+.2f} to %{customdata[1]:+.2f})",
    )


def _range(curves: Iterable[RelativeLosses]) -> list[float]:
    bounds = [100 * bound for curve in curves for change in curve.changes for bound in (change.low, change.high)]
    low, high = min(bounds, default=-1.0), max(bounds, default=1.0)
    margin = 0.08 * (max(high, 0.0) - min(low, 0.0)) or 1.0
    return [min(low, 0.0) - margin, max(high, 0.0) + margin]


def training_chart(trainings: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Draws diffusion and consistency loss over optimizer steps, a line per training run.

    Args:
        trainings: progress records by training run.
    """
    from plotly.subplots import make_subplots

    panels = [name for name in _PANELS if any(r[name] > 0 for records in trainings.values() for r in records)]
    figure = make_subplots(1, len(panels), subplot_titles=[_PANELS[name] for name in panels], horizontal_spacing=0.08)
    palette = colours(trainings)
    for column, panel in enumerate(panels, start=1):
        figure.update_yaxes(type=axis_type(r[panel] for records in trainings.values() for r in records), col=column)
        for name, records in trainings.items():
            steps, values = thinned([r["global_step"] for r in records], [r[panel] for r in records])
            figure.add_scatter(
                x=steps,
                y=values,
                mode="lines",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": palette[name], "width": 1.5},
                hovertemplate="step %{x}: %{y:.4g}",
                row=1,
                col=column,
            )
    figure.update_xaxes(title="optimizer step")
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    return bare(figure, height=360, legend=legend)


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Returns at most some hundreds of points: means over equal stretches, each at its last step."""
    size = -(-len(values) // _MOST_POINTS)
    starts = range(0, len(values), max(size, 1))
    return [steps[min(i + size, len(steps)) - 1] for i in starts], [fmean(values[i : i + size]) for i in starts]

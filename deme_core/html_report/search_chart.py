"""What a search tried."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from deme_core.html_report.chart_style import NEUTRAL, ROWS, axis_type, bare, colours
from deme_core.html_report.content import SearchLog
from deme_core.html_report.numbers import weight

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class _Point(NamedTuple):
    number: int
    weights: tuple[float, ...]
    score: float


# Weights are often equal: of points in one place, all must be seen.
_SYMBOLS = ("circle", "x", "diamond-open", "cross", "square-open", "star")


def search_chart(log: SearchLog) -> "Figure":
    """Draws the scores in the order in which they were asked for, and against each weight.

    Rough scores, of few sampling steps, have a scale of their own and so a line of panels of their own. Candidates
    without a score are left out, and keep their numbers.
    """
    from plotly.subplots import make_subplots

    lines = {"score": _points(log, rough=False)}
    if rough := _points(log, rough=True):
        lines = {"rough score": rough, **lines}
    figure = make_subplots(len(lines), 2, shared_yaxes=True, horizontal_spacing=0.04, vertical_spacing=0.2)
    for row, (title, tried) in enumerate(lines.items(), start=1):
        better = max if log.higher_is_better else min
        best = better(tried, key=lambda point: point.score).number
        _draw_order(figure, tried, best, better, row)
        _draw_weights(figure, tried, best, log.weight_names, row)
        figure.update_yaxes(type=axis_type(point.score for point in tried), row=row)
        figure.update_yaxes(title=title, col=1, row=row)
    figure.update_xaxes(title="candidate", col=1)
    figure.update_xaxes(title="weight" if len(log.weight_names) > 1 else log.weight_names[0], col=2)
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    return bare(figure, height=300 * len(lines) + 20, legend=legend)


def _points(log: SearchLog, *, rough: bool) -> list[_Point]:
    return [
        _Point(number, tried.weights, tried.score)
        for number, tried in enumerate(log.candidates, start=1)
        if tried.score is not None and tried.rough == rough
    ]


def _draw_order(figure: "Figure", tried: list[_Point], best: int, better: Callable[..., Any], row: int) -> None:
    numbers, scores = [point.number for point in tried], [point.score for point in tried]
    figure.add_scatter(
        x=numbers,
        y=list(itertools.accumulate(scores, better)),
        mode="lines",
        name="best so far",
        line={"color": NEUTRAL, "width": 1.5, "shape": "hv"},
        hoverinfo="skip",
        showlegend=row == 1,
        legendgroup="best so far",
        row=row,
        col=1,
    )
    figure.add_scatter(x=numbers, y=scores, **_markers(tried, best, ROWS["merged"]), showlegend=False, row=row, col=1)


def _draw_weights(figure: "Figure", tried: list[_Point], best: int, names: tuple[str, ...], row: int) -> None:
    palette = colours(names)
    for index, name in enumerate(names):
        figure.add_scatter(
            x=[point.weights[index] for point in tried],
            y=[point.score for point in tried],
            **_markers(tried, best, palette[name], _SYMBOLS[index % len(_SYMBOLS)]),
            name=name,
            legendgroup=name,
            showlegend=row == 1 and len(names) > 1,
            row=row,
            col=2,
        )


def _markers(tried: list[_Point], best: int, colour: str, symbol: str = "circle") -> dict[str, Any]:
    """Returns points that tell their weights; the one numbered ``best`` is larger and has a rim."""
    is_best = [point.number == best for point in tried]
    return {
        "mode": "markers",
        "text": [f"{point.number}: {', '.join(map(weight, point.weights))}" for point in tried],
        "hovertemplate": "%{text}<br>%{y:.5g}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": [13 if it_is else 8 for it_is in is_best],
            "line": {"color": NEUTRAL, "width": [2 if it_is else 0 for it_is in is_best]},
            "opacity": 0.85,
        },
    }

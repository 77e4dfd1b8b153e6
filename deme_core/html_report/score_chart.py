"""The scores with both intervals, and how far the rows differ."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deme_core.html_report.chart_style import NEUTRAL, bare, colours, translucent
from deme_core.html_report.content import Difference, Score, Scores
from deme_core.verdict import Interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_ROW_HEIGHT = 40


def score_chart(scores: Scores) -> "Figure":
    """Draws the deciding metric of all rows, and beside it the differences that carry a verdict.

    Points are sampling seeds, the line is the interval over them, the bar behind it the bootstrap over images.
    """
    from plotly.subplots import make_subplots

    rows = {name: by_metric[scores.metric] for name, by_metric in scores.rows.items()}
    palette = colours(rows)
    figure = make_subplots(1, 2 if scores.deciding else 1, horizontal_spacing=0.2)
    _draw_rows(figure, rows, palette)
    figure.update_xaxes(title=scores.metric, row=1, col=1)
    if scores.deciding:
        _draw_differences(figure, scores.deciding, palette)
        figure.update_xaxes(title=f"difference in {scores.metric}", row=1, col=2)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    margin = {"l": 8, "r": 16, "t": 12, "b": 52}
    return bare(figure, height=_ROW_HEIGHT * len(rows) + 90, showlegend=False, margin=margin)


def _draw_rows(figure: "Figure", rows: Mapping[str, Score], palette: Mapping[str, str]) -> None:
    for name, score in rows.items():
        _draw_intervals(figure, name, palette[name], score.seeds, score.images, column=1)
        figure.add_scatter(
            x=list(score.by_seed),
            y=[name] * len(score.by_seed),
            mode="markers",
            marker={"color": palette[name], "size": 5, "opacity": 0.55},
            hovertemplate="one seed: %{x:.5g}<extra></extra>",
            row=1,
            col=1,
        )


def _draw_differences(figure: "Figure", differences: Sequence[Difference], palette: Mapping[str, str]) -> None:
    for difference in differences:
        label = f"{difference.row}<br>− {difference.baseline}"
        _draw_intervals(figure, label, palette[difference.row], difference.seeds, difference.images, column=2)
    figure.add_vline(x=0, line={"color": NEUTRAL, "width": 1.5, "dash": "dot"}, row=1, col=2)


def _draw_intervals(
    figure: "Figure", label: str, colour: str, seeds: Interval, images: Interval | None, *, column: int
) -> None:
    if images is not None:
        figure.add_scatter(
            x=[images.low, images.high],
            y=[label, label],
            mode="lines+markers",  # Unseen points, so that a margin stays around them.
            marker={"opacity": 0, "size": 6},
            line={"color": translucent(colour, 0.3), "width": 14},
            hovertemplate="over images: %{x:.5g}<extra></extra>",
            row=1,
            col=column,
        )
    figure.add_scatter(
        x=[seeds.mean],
        y=[label],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [seeds.high - seeds.mean],
            "arrayminus": [seeds.mean - seeds.low],
            "color": colour,
            "thickness": 2,
            "width": 5,
        },
        mode="markers",
        marker={"color": colour, "size": 10, "symbol": "diamond"},
        hovertemplate=f"%{{x:.5g}}<br>over seeds: {seeds.low:.5g} to {seeds.high:.5g}<extra></extra>",
        row=1,
        col=column,
    )

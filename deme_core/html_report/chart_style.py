"""How the charts look: colours by row, a bare figure, what all of them share.

Text and grid lines take their colour from the page's style sheet, so that light, dark and print need no second chart.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_FONT = "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, system-ui, sans-serif"
_SIZE = 12.5  # Pixels.
NEUTRAL = "#8b929c"
_WIDEST_LINEAR = 5.0  # Largest over smallest number.
# Told apart by those who see no red or no green; readable on white and on black.
ROWS = {
    "pretrained": NEUTRAL,
    "finetuned": "#e08a1e",
    "ensemble": "#2a9d8f",
    "merged": "#3d74e0",
    "distilled": "#b1559b",
}
_OTHERS = ("#8c6bb1", "#d1495b", "#2f8fb3", "#6b8e23", "#a8803a", "#5f7d95", "#c76b3f")


def colours(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each name: rows have their own, everything else takes the next."""
    taken: dict[str, str] = {}
    for name in names:
        taken[name] = ROWS.get(name) or _OTHERS[sum(n not in ROWS for n in taken) % len(_OTHERS)]
    return taken


def translucent(colour: str, alpha: float) -> str:
    """Returns a colour #rrggbb with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"


def axis_type(values: Iterable[float]) -> Literal["log", "linear"]:
    """Returns a logarithmic axis for positive numbers that are far apart."""
    shown = list(values)
    return "log" if min(shown) > 0 and max(shown) > _WIDEST_LINEAR * min(shown) else "linear"


def bare(figure: "Figure", *, height: int, **layout: Any) -> "Figure":
    """Strips a figure of plotly's own look and gives it the page's."""
    margin: Mapping[str, int] = {"l": 64, "r": 16, "t": 32, "b": 48}
    figure.update_layout(
        template={},
        height=height,
        margin=margin,
        font={"family": _FONT, "size": _SIZE},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font": {"family": _FONT, "size": _SIZE}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
    )
    axis = {"zeroline": False, "automargin": True, "title_font_size": _SIZE}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_annotations(font_size=_SIZE)
    figure.update_layout(**layout)
    return figure

"""Puts content into a template: one HTML file with everything in it."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from deme_core.html_report import numbers
from deme_core.html_report.captions import scores_caption
from deme_core.html_report.chart_style import ROWS, colours
from deme_core.html_report.content import ComparisonContent, Difference, RunContent, Scores
from deme_core.html_report.loss_charts import heldout_chart, training_chart
from deme_core.html_report.score_chart import score_chart
from deme_core.html_report.search_chart import search_chart
from deme_core.html_report.sentences import comparison_sentence, headline

if TYPE_CHECKING:
    from jinja2 import Environment
    from plotly.graph_objects import Figure


def run_page(content: RunContent) -> str:
    """Returns the page of one run."""
    charts = {"scores": score_chart(content.scores)}
    if content.heldout:
        copies = frozenset(content.heldout.curves) - ROWS.keys()
        charts["heldout"] = heldout_chart(content.heldout, is_copy=copies)
    if content.trainings:
        charts["training"] = training_chart(content.trainings)
    charts |= {f"search-{index}": search_chart(log) for index, log in enumerate(content.searches)}
    sentence = headline(content.scores.differences, content.copies)
    return _render("run.html.j2", charts, content.scores, content=content, headline=sentence)


def comparison_page(content: ComparisonContent) -> str:
    """Returns the page of several runs."""
    charts = {"scores": score_chart(content.scores)}
    if content.heldout:
        charts["heldout"] = heldout_chart(content.heldout)
    sentence = comparison_sentence(content.scores.deciding)
    return _render("comparison.html.j2", charts, content.scores, content=content, headline=sentence)


def _render(template: str, charts: Mapping[str, "Figure"], scores: Scores, **context: Any) -> str:
    from plotly.offline import get_plotlyjs

    return (
        _environment()
        .get_template(template)
        .render(
            charts={name: _json(figure) for name, figure in charts.items()},
            places=_decimal_places(scores),
            scores_caption=scores_caption(scores),
            colours=colours(scores.rows),
            plotly_js=Markup(get_plotlyjs()),
            **context,
        )
    )


def _json(figure: "Figure") -> Markup:
    """Returns a figure as JSON that may stand in a script element, whatever a name in it contains."""
    text = figure.to_json().replace("<", "\\u003c")
    return Markup(text)


def _decimal_places(scores: Scores) -> dict[str, int]:
    """Returns the decimals of each metric, for its scores, and for differences at least."""
    metrics = next(iter(scores.rows.values()))
    return {
        metric: numbers.decimal_places([by_metric[metric].seeds.mean for by_metric in scores.rows.values()])
        for metric in metrics
    }


def difference_places(difference: Difference, at_least: int) -> int:
    """Returns the decimals of a difference: two digits for the bound next to zero, three at most for the farthest."""
    intervals = [found for found in (difference.seeds, difference.images) if found is not None]
    bounds = [abs(bound) for found in intervals for bound in (found.low, found.high)]
    return max(min(numbers.decimal_places(bounds, 2), numbers.decimal_places([max(bounds)], 3)), at_least)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("deme_core.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: list[Callable[..., str | int]] = [
        numbers.number,
        numbers.signed,
        numbers.weight,
        numbers.percent,
        numbers.duration,
        difference_places,
    ]
    environment.filters.update({each.__name__: each for each in filters})
    return environment

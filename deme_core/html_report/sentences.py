"""The verdict in a sentence."""

from collections.abc import Sequence

from deme_core.html_report.content import Copy, Difference
from deme_core.verdict import Verdict

_ORDER: tuple[Verdict, ...] = ("better", "worse", "too close to call")
# What a sentence calls the rows.
_NAMES = {
    "pretrained": "the pretrained model",
    # Not of equal steps: a distillation, which it makes up for, may have another batch.
    "finetuned": "the control that saw as many images",
    "merged": "The merged model",
    "distilled": "The distilled model",
}


def verdict_sentence(differences: Sequence[Difference]) -> str:
    """Returns what the differences of one row to its baselines say.

    For example: The merged model is better than the pretrained model; against the control that saw as many images it
    is too close to call.

    Args:
        differences: those that carry a verdict, of the same row; at least one.
    """
    subject, clauses = _name(differences[0].row), list[str]()
    for verdict in _ORDER:
        baselines = [_name(d.baseline) for d in differences if d.verdict == verdict]
        if baselines:
            clauses.append(_clause("it" if clauses else subject, verdict, baselines))
    return f"{'; '.join(clauses)}."


def headline(differences: Sequence[Difference], copies: Sequence[Copy] = ()) -> str:
    """Returns a sentence for each row that has verdicts; nothing if none has.

    Args:
        differences: those with a verdict are told of.
        copies: what was merged; without any weight but 0 the merged model is no other than the pretrained one.
    """
    deciding = [difference for difference in differences if difference.verdict is not None]
    sentences = []
    if copies and not any(any(copy.weights) for copy in copies):
        sentences.append("The merged model is the pretrained model: all merge weights are 0.")
        deciding = [d for d in deciding if (d.row, d.baseline) != ("merged", "pretrained")]
    rows = dict.fromkeys(difference.row for difference in deciding)
    return " ".join(sentences + [verdict_sentence([d for d in deciding if d.row == row]) for row in rows])


def comparison_sentence(differences: Sequence[Difference]) -> str:
    """Returns what several rows' differences to one baseline say: Against A, B is better; C is too close to call."""
    clauses = []
    for verdict in _ORDER:
        rows = [d.row for d in differences if d.verdict == verdict]
        if rows:
            clauses.append(f"{_listed(rows)} {'is' if len(rows) == 1 else 'are'} {verdict}")
    return f"Against {differences[0].baseline}, {'; '.join(clauses)}."


def _clause(subject: str, verdict: Verdict, baselines: Sequence[str]) -> str:
    if verdict != "too close to call":
        return f"{subject} is {verdict} than {_listed(baselines)}"
    if subject == "it":
        return f"against {_listed(baselines)} it is {verdict}"
    return f"{subject} against {_listed(baselines)} is {verdict}"


def _name(row: str) -> str:
    return _NAMES.get(row, row)


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last

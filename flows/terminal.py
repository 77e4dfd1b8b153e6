"""Lines in the terminal that may hold what is not ours: names of files and models, and what others say."""

from rich.console import Console


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Prints a text as it is: brackets are no markup, and what a terminal would obey is spelled out."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Returns a text with escapes in place of all that cannot be printed but ends of lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

"""Scores that a search has paid for, kept in a file: a search that was killed goes on where it was.

Strategies are deterministic: they propose the same weights again, and those in the log cost nothing.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deme_core.store import local_errors


class ScoreLog:
    """A file with one JSON line per score; a line that a kill left unfinished is ignored.

    Args:
        path: the file, made with the first score.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            self._known[key] = value

    def remember(self, kind: str, weights: tuple[float, ...], compute: Callable[[], Any]) -> Any:
        """Returns the known value of ``weights``, or computes and keeps it.

        Args:
            kind: what is computed, e.g. full or rough.
            weights: of the candidate.
            compute: returns plain JSON values.
        """
        key = f"{kind} {json.dumps(weights)}"
        if key not in self._known:
            self._known[key] = compute()
            with local_errors(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write("\n" + json.dumps([key, self._known[key]]))
        return self._known[key]

    def count(self, kind: str) -> int:
        """Returns how many values of a kind were paid for, by earlier processes too."""
        return sum(key.startswith(f"{kind} ") for key in self._known)

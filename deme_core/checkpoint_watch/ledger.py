"""What earlier looks found and started, kept in DeMe's object store so that no other database is needed.

In the store, under ``watch/<key of prefix and recipe>/``::

    looks/<fingerprint of a listing>.json    what reading that folder gave; written once
    starts/<digest of weights>.json          claimed by one watcher before, completed after it started the run
    last-look.json                           what lay under the prefix at the last look
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TypeVar
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from deme_core.checkpoint_watch.inspection import Verdict
from deme_core.digests import json_digest
from deme_core.errors import DemeError
from deme_core.store import ObjectStore, StoredObject, store_time

# A watcher that has not completed its claim by then has died.
CLAIM_EXPIRES_AFTER = timedelta(minutes=5)


@dataclass(frozen=True)
class Look:
    """A look at one folder.

    Attributes:
        uri: the folder.
        fingerprint: of its listing.
        since: when that listing was first seen, or the time of its newest file.
        verdict: what it holds.
        flow_run_id: the run that its weights started, if this is known.
    """

    uri: str
    fingerprint: str
    since: datetime
    verdict: Verdict
    flow_run_id: str | None = None


@dataclass(frozen=True)
class Start:
    """A run that is being started, or was.

    Attributes:
        uri: the folder it was started for.
        claimed_by: the watcher.
        flow_run_id: the run; None while it is being started.
        claimed_at: by the watcher's clock, for people: what counts is the store's.
        claim_id: tells one claim from another.
    """

    uri: str
    claimed_by: str
    flow_run_id: str | None = None
    claimed_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    claim_id: str = field(default_factory=lambda: uuid4().hex)


T = TypeVar("T")
_LOOK, _START, _LAST_LOOK = TypeAdapter(Look), TypeAdapter(Start), TypeAdapter(dict[str, Look])


class Ledger:
    """The ledger of one prefix and recipe, as it is at one look; safe for many watchers at once.

    Args:
        store: DeMe's object store.
        prefix: URI of what is watched.
        recipe: what is run on each new checkpoint.
    """

    def __init__(self, store: ObjectStore, *, prefix: str, recipe: str) -> None:
        self.store = store
        self._root = f"watch/{json_digest([prefix, recipe])[:16]}"

    @property
    def uri(self) -> str:
        """Where its entries lie."""
        return f"{self.store.uri}/{self._root}"

    @cached_property
    def now(self) -> datetime:
        """The time, by the store's clock; also shows, before anything is read, that the store can be written."""
        return store_time(self.store)

    @cached_property
    def last_look(self) -> dict[str, Look]:
        """What lay under the prefix at the last look, by URI of the folder."""
        return self._get("last-look.json", _LAST_LOOK) if "last-look.json" in self._entries else {}

    def remember(self, looks: Iterable[Look]) -> None:
        """Makes these the last look."""
        last_look = {look.uri: look for look in looks}
        if last_look != self.last_look:
            self._put("last-look.json", _LAST_LOOK, last_look)

    def find_look(self, uri: str, fingerprint: str) -> Look | None:
        """Returns what reading this listing of a folder once gave."""
        name = f"looks/{fingerprint}.json"
        if name not in self._entries:
            return None
        last = self.last_look.get(uri)
        if last is not None and last.fingerprint == fingerprint and last.verdict.outcome != "waiting":
            return last
        return self._get(name, _LOOK)

    def add_look(self, look: Look) -> bool:
        """Notes for ever what reading a folder gave; False if another watcher did so first."""
        return self._put(f"looks/{look.fingerprint}.json", _LOOK, look, if_absent=True)

    def start_once(self, look: Look, start: Callable[[], str], *, claimed_by: str) -> tuple[Look, bool]:
        """Starts a run for the weights of a folder unless one was started, or is just being started by another.

        Args:
            look: at a whole folder.
            start: starts the run and returns its id; called twice for the same weights, it must start one run.
            claimed_by: who starts it.

        Returns:
            The look, with the id of the run if there is one, and whether it was started here.
        """
        name = f"starts/{look.verdict.digest}.json"
        if look.flow_run_id is not None and name in self._entries:
            return look, False
        claim = Start(look.uri, claimed_by)
        if not self._put(name, _START, claim, if_absent=True):
            found = self._get(name, _START)
            # A write that is repeated after a lost answer finds itself.
            if found != claim and (found.flow_run_id is not None or not self._has_expired(name)):
                return replace(look, flow_run_id=found.flow_run_id), False
        started = replace(claim, flow_run_id=start())
        self._put(name, _START, started)
        return replace(look, flow_run_id=started.flow_run_id), True

    def _has_expired(self, name: str) -> bool:
        return name in self._entries and self.now - self._entries[name].modified >= CLAIM_EXPIRES_AFTER

    @cached_property
    def _entries(self) -> Mapping[str, StoredObject]:
        """All entries as they are at the beginning of the look, by name."""
        return {found.key.removeprefix(f"{self._root}/"): found for found in self.store.list(f"{self._root}/")}

    def _get(self, name: str, kind: TypeAdapter[T]) -> T:
        try:
            return kind.validate_json(self.store.get_bytes(f"{self._root}/{name}"))
        except ValidationError as error:
            raise DemeError(f"{self.uri}/{name} is malformed; remove it, and the next look makes it anew.") from error

    def _put(self, name: str, kind: TypeAdapter[T], content: T, *, if_absent: bool = False) -> bool:
        return self.store.put_bytes(f"{self._root}/{name}", kind.dump_json(content, indent=2), if_absent=if_absent)

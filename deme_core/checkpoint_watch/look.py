"""One look under a prefix: which folders are new, which wait, which are broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deme_core.checkpoint_watch.candidates import Candidate, find_candidates
from deme_core.checkpoint_watch.inspection import Verdict, inspect
from deme_core.checkpoint_watch.ledger import Ledger, Look
from deme_core.errors import InputError, StoreUnavailableError
from deme_core.file_store import FileStore
from deme_core.store import ObjectStore, StoredObject, open_store


@dataclass(frozen=True)
class Finding:
    """What a look found of one folder.

    Attributes:
        look: the look.
        is_new: no look before, and no other watcher, has come to this verdict; a folder that waits is never new.
    """

    look: Look
    is_new: bool


def open_prefix(uri: str) -> ObjectStore:
    """Opens what is to be watched.

    Raises:
        InputError: it is no URI of a folder or a bucket.
        StoreUnavailableError: there is no such folder: a typing error, or a disk that is not mounted.
    """
    with _naming_prefix():
        source = open_store(uri)
    if isinstance(source, FileStore) and not source.folder.is_dir():
        raise StoreUnavailableError(f"There is no folder {source.uri} to watch; make it or correct the prefix.")
    return source


def look(source: ObjectStore, ledger: Ledger, *, settle: timedelta, home: Path) -> list[Finding]:
    """Judges every folder under a prefix; what was read before is not read again.

    Args:
        source: what is watched.
        ledger: what earlier looks found; this one is added.
        settle: how long a folder must have stayed as it is before it is read.
        home: DeMe's own folder, which is not looked into; downloads go to its ``scratch``.

    Raises:
        StoreUnavailableError: the prefix or the ledger cannot be used.
    """
    with _naming_prefix():
        candidates = list(find_candidates(_foreign_objects(source, home)))
    findings = [_judge(source, ledger, candidate, settle, home / "scratch") for candidate in candidates]
    ledger.remember(finding.look for finding in findings)
    return findings


def _judge(source: ObjectStore, ledger: Ledger, candidate: Candidate, settle: timedelta, scratch: Path) -> Finding:
    uri, fingerprint = _uri(source, candidate.folder), candidate.fingerprint
    if known := ledger.find_look(uri, fingerprint):
        return Finding(known, is_new=False)
    now = _now(source, ledger)
    since = _quiet_since(candidate, ledger.last_look.get(uri), now)
    if now - since < settle:
        verdict = Verdict("waiting", f"it changed less than {settle.total_seconds():.0f} s ago or since the last look")
        return Finding(Look(uri, fingerprint, since, verdict), is_new=False)
    with _naming_prefix():
        verdict = inspect(source, candidate, scratch)
    new_look = Look(uri, fingerprint, since, verdict)
    return Finding(new_look, is_new=verdict.outcome != "waiting" and ledger.add_look(new_look))


def _quiet_since(candidate: Candidate, last: Look | None, now: datetime) -> datetime:
    """Since when a folder is as it is: an upload may keep the times that its files had elsewhere."""
    if last is None:
        return min(candidate.modified, now)
    return last.since if last.fingerprint == candidate.fingerprint else now


def _now(source: ObjectStore, ledger: Ledger) -> datetime:
    """The time by the clock that dates the files: the ledger's store shares it if it is of the same kind."""
    return ledger.now if type(source) is type(ledger.store) else datetime.now(UTC)


def _foreign_objects(source: ObjectStore, home: Path) -> Iterator[StoredObject]:
    """All objects but those below DeMe's own folder, where merged models lie in caches."""
    own = None
    if isinstance(source, FileStore) and home.is_relative_to(folder := source.folder.resolve()) and home != folder:
        own = f"{home.relative_to(folder).as_posix()}/"
    return (found for found in source.list("") if own is None or not found.key.startswith(own))


def _uri(source: ObjectStore, folder: str) -> str:
    if isinstance(source, FileStore):
        return (source.folder / folder).as_uri()
    return f"{source.uri}/{folder}".rstrip("/")


@contextmanager
def _naming_prefix() -> Iterator[None]:
    """Makes messages of the object store speak of the prefix, and not of the store that DeMe itself uses."""
    try:
        yield
    except InputError as error:
        raise type(error)(str(error).replace("DEME_STORE_URI", "the prefix")) from error

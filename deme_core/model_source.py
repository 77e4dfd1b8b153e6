"""Where a pretrained model comes from: a folder, an object-store URI, or a hub id."""

import re
from contextlib import suppress
from pathlib import Path

from deme_core.downloads import download_once, listing_version
from deme_core.errors import InputError, ModelFolderError, StoreUnavailableError, first_line
from deme_core.local_files import check_space, user_path
from deme_core.needed_files import needed_files
from deme_core.store import ObjectStore, open_store

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def fetch_source(source: str, *, revision: str | None, cache: Path) -> Path:
    """Returns a local folder with the model that ``source`` names; a local file as it is, for its opening to refuse.

    Args:
        source: a folder, a ``file://`` or ``s3://`` URI, or a hub id such as ``google/ddpm-cifar10-32``.
        revision: git revision of a hub id.
        cache: downloads of a URI go here.

    Raises:
        InputError: there is nothing under that name, or the hub cannot be reached.
        StoreUnavailableError: the object store cannot be reached, or the disk has no room for the model.
    """
    if "://" in source:
        return _fetch_uri(source, cache)
    if (folder := user_path(source)).exists():
        return folder
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return _fetch_from_hub(source, revision)
    raise ModelFolderError(
        f"The model '{source}' is no folder, object-store URI or hub id; name a folder that holds the model, "
        "s3://BUCKET/PREFIX or OWNER/MODEL."
    )


def _fetch_uri(uri: str, cache: Path) -> Path:
    store = _open(uri)
    listed = {item.key: item for item in store.list("")}
    objects = [listed[name] for name in needed_files(listed)]
    if not objects:
        raise ModelFolderError(f"There is no model under {uri}.")
    return download_once(store, objects, cache / "sources" / listing_version(uri, objects))


def _open(uri: str) -> ObjectStore:
    try:
        return open_store(uri)
    except StoreUnavailableError:
        raise
    except InputError as error:
        # Not repeated: it may hold a password.
        raise ModelFolderError("The model's address is no object-store URI; give s3://BUCKET/PREFIX.") from error


def _fetch_from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache

    hub = Path(constants.HF_HUB_CACHE)
    try:
        try:
            found = model_info(repo_id, revision=revision, files_metadata=True)
        except Exception as error:
            # What the hub's own client has downloaded once is good enough where the hub cannot be asked.
            if getattr(error, "response", None) is None and (folder := _cached_snapshot(repo_id, revision)):
                return folder
            raise
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        files = needed_files(sizes)
        missing = [name for name in files if try_to_load_from_cache(repo_id, name, revision=found.sha) is None]
        hub.mkdir(parents=True, exist_ok=True)
        check_space(hub, sum(sizes[name] for name in missing), variable="HF_HOME")
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except StoreUnavailableError:
        raise
    except Exception as error:  # the hub client raises HTTP, cache, validation and OS errors of many kinds
        reason = first_line(error)
        raise ModelFolderError(
            f"{repo_id} is not a local folder and could not be had from the hub ({type(error).__name__}: {reason}); "
            "name a folder that holds the model, in a recipe as pretrained.source."
        ) from error


def _cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Returns what was downloaded of a model before, if that is all that DeMe needs of it."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    with suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        files = needed_files(file.path for file in get_cached_repo_tree(repo_id, revision=revision))
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files, local_files_only=True))
    return None

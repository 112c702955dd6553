"""Finding and listing runs under a project root."""

from __future__ import annotations

import logging
import re

from danling_core import storage
from danling_core.errors import AccessDenied, ConfigError, NotFound, StorageError
from danling_core.runs import cache as run_cache
from danling_core.runs.folder import CONFIG, STATUS, TIMESTAMP, RunFolder, Status
from danling_core.runs.last_word import last_word

logger = logging.getLogger("danling")

NAME_AND_ID = re.compile(r"(?P<name>.+)-(?P<id>.{8}[0-9a-f]{8})")
_SHORTEST_ID_PREFIX = 4


def list_runs(root_url: str) -> list[tuple[RunFolder, Status | None]]:
    """Every run under a project root, sorted: one flat listing, then one small read per run, in parallel.

    Remote runs known to be complete are not read again; of the others the lease is listed, too. A folder with a config
    but no readable status is listed with None; other files are ignored.
    """
    if storage.is_local(root_url):
        found = [(folder, folder.find_status()) for folder in sorted(_local_run_folders(root_url))]
    else:
        contents = _remote_statuses(root_url)
        found = [(folder, _parse_leniently(folder, contents[folder])) for folder in sorted(contents)]
    return [(folder, last_word(folder, status)) for folder, status in found]


def _remote_statuses(root_url: str) -> dict[RunFolder, bytes | None]:
    found: dict[RunFolder, bytes | None] = {}
    statuses: dict[str, storage.Entry] = {}
    for entry in storage.list_tree(root_url):
        parts = entry.path.split("/")
        if len(parts) == 3 and parts[2] in (STATUS, CONFIG) and TIMESTAMP.fullmatch(parts[1]):
            folder = RunFolder(storage.join(root_url, parts[0], parts[1]))
            found.setdefault(folder)
            if parts[2] == STATUS:
                statuses[folder.status_url] = entry
    contents = run_cache.read_statuses(root_url, statuses)
    return {folder: contents.get(folder.status_url) for folder in found}


def _local_run_folders(root_url: str) -> set[RunFolder]:
    found = set()
    for name in storage.list_names(root_url):
        try:
            folders = _timestamped(storage.join(root_url, name))
            found |= {folder for folder in folders if folder.holds_run()}
        except AccessDenied as error:  # such as the lost+found of a disk
            logger.debug("passed over: %s", error)
    return found


def _parse_leniently(folder: RunFolder, data: bytes | None) -> Status | None:
    if data is None:
        return None
    try:
        return Status.parse(data, folder.status_url)
    except StorageError as error:
        logger.warning("%s", error)
        return None


def _timestamped(parent_url: str) -> list[RunFolder]:
    names = [name for name in storage.list_names(parent_url) if TIMESTAMP.fullmatch(name)]
    return [RunFolder(storage.join(parent_url, name)) for name in sorted(names, reverse=True)]


def parent_url(root_url: str, name: str, id: str) -> str:
    """Return the folder that holds every attempt at one run: `{root}/{name}-{id}`.

    A name is a label, and the id says which run it is. So where a run of this id has begun under another name, its
    folder is returned.
    """
    own = f"{name}-{id}"
    if _is_begun_in(storage.join(root_url, own)):
        return storage.join(root_url, own)
    others = [found for found in storage.list_names(root_url) if found.endswith(f"-{id}") and found != own]
    begun = (other for other in sorted(others) if _is_begun_in(storage.join(root_url, other)))
    return storage.join(root_url, next(begun, own))


def _is_begun_in(parent_url: str) -> bool:
    return any(folder.is_begun() for folder in _timestamped(parent_url))


def find_folders(root_url: str, name: str, id: str) -> list[RunFolder]:
    """Return the folders of one run, newest first, whatever it was called when it began."""
    return _timestamped(parent_url(root_url, name, id))


def begun_folders(root_url: str, name: str, id: str) -> list[RunFolder]:
    """Return the folders of one run in which it has begun, newest first: not those that hold somebody else's file."""
    return [folder for folder in find_folders(root_url, name, id) if folder.is_begun()]


def resolve(root_url: str, text: str) -> RunFolder:
    """Return the run that a user means: path or URL of its folder, `{name}-{id}`, an id, its beginning, or a name.

    Several runs have one name when its code or config changed: the newest of them is meant, and the log names the
    others.

    Raises:
        NotFound: no run is called so; the message lists what there is.
        ConfigError: the beginning of an id is that of several.
    """
    if _looks_like_location(text) and (folder := _at_location(text)):
        return folder
    names = [name for name in storage.list_names(root_url) if NAME_AND_ID.fullmatch(name)]
    matches = [name for name in names if _is_called(name, text)]
    if len(matches) > 1 and not all(NAME_AND_ID.fullmatch(name)["name"] == text for name in matches):  # type: ignore[index]
        raise ConfigError(f"{text!r} may be any of {', '.join(matches[:8])}: give more of its id")
    if not matches:
        known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise NotFound(f"no run {text!r} under {root_url}; there is {known or 'none at all'}")
    folders = [folder for name in matches if (folder := _newest_begun(storage.join(root_url, name)))]
    if not folders:
        raise NotFound(f"{', '.join(matches)} under {root_url} holds no run")
    folders.sort(key=lambda folder: folder.timestamp, reverse=True)
    if len(folders) > 1:
        others = ", ".join(storage.base_name(storage.parent(folder.url)) for folder in folders[1:9])
        logger.warning("%r is the newest of %d runs of that name; the others: %s", text, len(folders), others)
    return folders[0]


def _looks_like_location(text: str) -> bool:
    return "://" in text or "/" in text or text in (".", "..") or storage.exists(text)


def _at_location(url: str) -> RunFolder | None:
    folder = RunFolder(url.rstrip("/") or "/")
    if folder.holds_run():
        return folder
    return _newest_begun(url)


def _newest_begun(parent_url: str) -> RunFolder | None:
    return next(
        (folder for folder in _timestamped(parent_url) if folder.is_begun() or folder.holds_run()), None
    )


def _is_called(folder_name: str, text: str) -> bool:
    match = NAME_AND_ID.fullmatch(folder_name)
    if match is None:
        return False
    is_prefix = len(text) >= _SHORTEST_ID_PREFIX and match["id"].startswith(text)
    return is_prefix or text in (folder_name, match["name"], match["id"])

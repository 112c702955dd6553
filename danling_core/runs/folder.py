"""The names and formats of a run's files."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from danling_core import storage
from danling_core.errors import ConfigError, NotFound, StorageError, StoreUnavailable
from danling_core.runs.segments import segments_by_file, segments_url

if TYPE_CHECKING:
    from danling_core.config import Config

logger = logging.getLogger("danling")

CONFIG, METADATA, LOG, EVENTS = "config.yaml", "metadata.json", "run.log", "events.jsonl"
RESULTS, LATEST, BEST, EVALUATION = "results.json", "latest.json", "best.json", "evaluation.json"
STATUS, CHECKPOINTS, TENSORBOARD, LEASE = "status.json", "checkpoints", "tensorboard", "lease"

TIMESTAMP = re.compile(r"\d{8}-\d{6}-\d{6}")


class Status(BaseModel):
    """Progress of a run, in a few hundred bytes; `status="complete"`, written last, is its completion record.

    Fields written by a newer version are ignored. Numbers that are not finite survive the file.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    status: Literal["running", "complete", "failed", "interrupted"]
    name: str
    id: str
    run_id: str = ""
    experiment_id: str = ""
    experiment_name: str = ""
    run_name: str = ""
    group: str | None = None
    timestamp: str = ""
    attempt: str = ""
    world_size: int = 1
    bitwise: bool = True
    not_bitwise: str | None = None
    epochs: int = 0
    steps: int = 0
    iters: int = 0
    progress: float = 0.0
    score_split: str | None = None
    score_name: str | None = None
    score_mode: str | None = None
    best_index: int | None = None
    best_score: float | None = None
    latest_score: float | None = None
    evaluation: dict[str, Any] | None = None
    seconds: float = 0.0
    updated_at: str = ""
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.status == "complete"

    @classmethod
    def parse(cls, data: bytes, url: str = STATUS) -> Status:
        """Return the status in bytes that were read at `url`. Raises `StorageError` where they are none."""
        try:
            return cls.model_validate(storage.parse_json_object(data, url))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
            raise StorageError(f"{url} is no status record: {problems}") from error


@dataclass(frozen=True, order=True)
class RunFolder:
    """The folder of one run, local or remote; it need not exist."""

    url: str

    @property
    def config_url(self) -> str:
        return storage.join(self.url, CONFIG)

    @property
    def metadata_url(self) -> str:
        return storage.join(self.url, METADATA)

    @property
    def events_url(self) -> str:
        return storage.join(self.url, EVENTS)

    @property
    def results_url(self) -> str:
        return storage.join(self.url, RESULTS)

    @property
    def latest_url(self) -> str:
        return storage.join(self.url, LATEST)

    @property
    def best_url(self) -> str:
        return storage.join(self.url, BEST)

    @property
    def evaluation_url(self) -> str:
        return storage.join(self.url, EVALUATION)

    @property
    def status_url(self) -> str:
        return storage.join(self.url, STATUS)

    @property
    def checkpoints_url(self) -> str:
        return storage.join(self.url, CHECKPOINTS)

    @property
    def tensorboard_url(self) -> str:
        return storage.join(self.url, TENSORBOARD)

    @property
    def timestamp(self) -> str:
        """Return the folder's own name: the creation time of the run."""
        return storage.base_name(self.url)

    @property
    def lease_parent_url(self) -> str:
        """URL for `Lease.acquire`: the folder above, shared by all timestamps of the run; for
        a folder that is not named by a timestamp, itself."""
        return storage.parent(self.url) if TIMESTAMP.fullmatch(self.timestamp) else self.url

    @property
    def lease_url(self) -> str:
        """Return the lease's own folder (`Lease.url`), for `lease.guard` and the mirror."""
        return storage.join(self.lease_parent_url, LEASE)

    def holds_run(self) -> bool:
        """Return whether a config or a status lies here."""
        return not {STATUS, CONFIG}.isdisjoint(storage.list_names(self.url))

    def is_begun(self) -> bool:
        """Return whether a run was made here: by its status, or the metadata that is written first."""
        return not {STATUS, METADATA}.isdisjoint(storage.list_names(self.url))

    def read_status(self) -> Status | None:
        """Return the status, or None where none is written yet. Raises `StorageError` where it cannot be read."""
        try:
            return Status.parse(storage.read_bytes(self.status_url, storage.DOCUMENT_BYTES), self.status_url)
        except NotFound:
            return None

    def find_status(self) -> Status | None:
        """Return the status; None, with a warning, where the file is damaged: the newest checkpoint says the rest."""
        try:
            return self.read_status()
        except StoreUnavailable:
            raise
        except StorageError as error:
            logger.warning("%s: it is passed over, and the checkpoints count", error)
            return None

    def read_config(self) -> Config:
        """Return the run's config. Raises `NotFound`, or `ConfigError` where the file holds none."""
        from danling_core.config import Config, documents

        url = self.config_url
        text = documents.decode(storage.read_bytes(url, storage.DOCUMENT_BYTES), url)
        try:
            return Config.from_yamls(text)
        except ConfigError as error:
            raise ConfigError(f"{url}: {error}") from error

    def write_status(self, status: Status) -> None:
        """Replace the status whole, so that a loss of power leaves the old one or the new one. Only the run's owner
        calls this (rank 0, or the launcher after it)."""
        storage.write_json(self.status_url, status.model_dump(mode="python"))


def checkpoints_url(folder: RunFolder, config: Config | None) -> str:
    """Return the URL of the checkpoints of a run with this config."""
    if config is None:
        return folder.checkpoints_url
    return config.checkpoint_dir or storage.join(folder.url, config.checkpoint_dir_name)


def find_checkpoints(folder: RunFolder) -> str:
    """Return the URL of the checkpoints of the run in a folder, by its config.yaml."""
    try:
        config = folder.read_config()
    except NotFound:
        config = None
    return checkpoints_url(folder, config)


def read_log(folder: RunFolder | str, name: str) -> bytes:
    """Return the whole of an append-only file (`events.jsonl`, `run.log`), from itself or from its segments.

    Raises:
        NotFound: neither is there.
    """
    url = folder.url if isinstance(folder, RunFolder) else folder
    try:
        return storage.read_bytes(storage.join(url, name))
    except NotFound:
        parts = _segment_urls(url, name)
        if not parts:
            raise
        return b"".join(_all_present(parts, storage.read_many(parts)))


def _segment_urls(folder_url: str, name: str) -> list[str]:
    folder = segments_url(folder_url, name)
    stem, _, suffix = name.rpartition(".")
    sizes = {f"{stem}/{found}": 0 for found in storage.list_names(folder) if found.endswith(f".{suffix}")}
    segments = segments_by_file(sizes).get(name, [])
    return [storage.join(folder_url, segment.path) for segment in segments]


def _all_present(urls: Iterable[str], contents: Iterable[bytes | None]) -> Iterable[bytes]:
    for url, data in zip(urls, contents, strict=True):
        if data is None:
            raise NotFound(f"{url} was listed a moment ago and is gone")
        yield data

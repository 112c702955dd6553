"""Ids of a run, from its code and its config: the same on any machine and in any folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid5

from danling_core.config import Config
from danling_core.config.documents import canonical_json
from danling_core.errors import ConfigError
from danling_core.identity.code_state import code_state
from danling_core.identity.imports import imported_files

NO_SOURCE = "0" * 40  # the experiment id of code that lies in no file, as in a notebook
_FILE_RUNNER = re.compile(r"(?P<file>.*\.py|__main__):(?P<name>[^:]+)")


@dataclass(frozen=True)
class Identity:
    """The ids and the name of a run.

    Attributes:
        experiment_id: the code. 40 hex digits: a git commit, or outside git the hash of the source; "-" and
            12 more when the tree is dirty; or what the config states.
        run_id: the code and the canonical config, as 32 hex digits.
        id: first 8 of `experiment_id` + first 8 of `run_id`.
        uuid: uuid5 of `id` in the namespace UUID(run_id).
        name: `{experiment_name}-{run_name}`, unless the config overrides it.
    """

    experiment_id: str
    run_id: str
    id: str
    uuid: UUID
    name: str


def identify(config: Config, source_file: str | None, exclude: Sequence[str] = ()) -> Identity:
    """Return the identity of a run of `config` with the runner defined in `source_file`.

    Args:
        config: its canonical form is hashed.
        source_file: where the runner's class is defined; None when it lies in no file.
        exclude: folders whose content is no code; the config's own storage locations are always excluded.

    Raises:
        ConfigError: the source file does not exist, or git does not answer.
    """
    stated = config.experiment_id
    if stated is None:
        experiment_id = experiment_id_of(source_file, [*stores(config), *exclude], callback_files(config))
    else:
        experiment_id = stated
    text = experiment_id + canonical_json(_canonical(config, source_file))
    run_id = hashlib.sha256(text.encode()).hexdigest()[:32]
    short = experiment_id[:8] + run_id[:8]
    name = f"{config.experiment_name}-{config.run_name}" if config.name is None else config.name
    return Identity(experiment_id, run_id, short, uuid5(UUID(run_id), short), name)


def experiment_id_of(source_file: str | None, exclude: Sequence[str] = (), others: Sequence[str] = ()) -> str:
    """Return the id of the code around `source_file`.

    In a git repository with a commit: that commit, and for a dirty tree a hash of what differs from it: `git diff
    HEAD`, and each file that the source imports and git does not track (`exclude` left out). A stray file beside it is
    no difference. Elsewhere, or without a git program: a hash of the source and of what it imports.

    Args:
        others: files that count besides, with what they import.
    """
    if source_file is None:
        return NO_SOURCE
    source = Path(source_file).resolve()
    if not source.is_file():
        raise ConfigError(
            f"the runner's source {source_file!r} is not a file: state experiment_id in the config"
        )
    imported = sorted({file for each in (source, *map(_real, others)) for file in imported_files(each)})
    folders = [_local_folder(folder) for folder in exclude if "://" not in folder]
    state = code_state(source, folders, imported)
    if state is None:
        return _digest_of(source, imported)[:40]
    return state.commit if state.difference is None else f"{state.commit}-{state.difference[:12]}"


def callback_files(config: Config) -> list[str]:
    """Return the files of the callbacks that the config names: code of the run that its runner does not import."""
    found = []
    for callback in config.callbacks:
        module, _, _ = callback.name.rpartition(":")
        if module.endswith(".py"):
            found.append(module)
            continue
        loaded = sys.modules.get(module)
        spec = None if loaded is not None else importlib.util.find_spec(module)
        file = getattr(loaded, "__file__", None) if spec is None else spec.origin
        if file is not None:
            found.append(file)
    return [file for file in found if Path(file).is_file()]


def stores(config: Config) -> list[str]:
    """Return the places where the config has runs stored, which are no code."""
    places = (config.project_root, config.dir, config.checkpoint_dir, config.log_path, config.scratch)
    return [place for place in places if place is not None]


def new_timestamp(now: datetime | None = None) -> str:
    """Return the creation time of a run, as `20261121-103249-123456`: UTC with microseconds, in an order that sorts.

    A `now` without a time zone is taken as local time.
    """
    moment = datetime.now(UTC) if now is None else now.astimezone(UTC)
    return moment.strftime("%Y%m%d-%H%M%S-%f")


def is_named_by_file(config: Config) -> bool:
    """Return whether the runner is named by a file or a script, so that the file's content is part of the run's id."""
    return _FILE_RUNNER.fullmatch(config.runner or "") is not None


def _canonical(config: Config, source_file: str | None) -> dict[str, object]:
    """Return the canonical config, in which a runner in a file or a script is named by its content, not its path.

    A path depends on the current folder, and two files of one commit may define classes of the same name.
    """
    values = dict(config.canonical())
    if (runner := _by_content(config.runner or "", source_file)) is not None:
        values["runner"] = runner
    if config.callbacks:
        values["callbacks"] = [
            {**each.model_dump(mode="json"), "name": _by_content(each.name) or each.name}
            for each in config.callbacks
        ]
    return values


def _by_content(target: str, source_file: str | None = None) -> str | None:
    """Return a class in a file by that file's content; None where it is named by its module."""
    match = _FILE_RUNNER.fullmatch(target)
    if match is None:
        return None
    file = Path(source_file or match["file"])
    digest = f"@{_source_digest(file)[:12]}" if file.is_file() else ""
    return f"{file.name}:{match['name']}{digest}"


def _real(path: str) -> Path:
    return Path(path).resolve()


def _local_folder(folder: str) -> Path:
    return Path(os.path.realpath(Path(folder).expanduser()))


def _digest_of(source: Path, imported: Sequence[Path]) -> str:
    if list(imported) == [source]:
        return _source_digest(source)
    parts = sorted(f"{os.path.relpath(path, source.parent)} {_source_digest(path)}" for path in imported)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source_digest(source: Path) -> str:
    text = source.read_bytes().replace(b"\r\n", b"\n")  # a checkout on another system is the same code
    return hashlib.sha256(text).hexdigest()

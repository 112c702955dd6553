"""A runner and its config as files: save, load, and their twins that make a runner."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Self, get_args

from danling_core import storage
from danling_core.config import Config, documents
from danling_core.config.overrides import apply
from danling_core.errors import CheckpointError, ConfigError, NotFound
from danling_core.runner.methods import Action, File, Values
from danling_core.runner.resolve import import_runner
from danling_core.runner.views import RunnerViews
from danling_core.storage.json_safe import from_json_safe

_TENSORS = (".pt", ".pth", ".bin", ".ckpt")
_YAML = (".yaml", ".yml")
_KNOWN = ", ".join([*_TENSORS, ".json", *_YAML])
_ENDS = ("epoch_end", "step_end", "iter_end")


class Serialization(RunnerViews):
    """Reads and writes: objects, the config, runners made from configs and checkpoints."""

    _stated: Values
    _is_open: bool

    # objects ------------------------------------------------------------------------------------------------
    def save(self, obj: Any, file: File, main_process_only: bool = True) -> File:
        if main_process_only and not self.is_main_process:
            return file
        url, suffix = os.fspath(file), _suffix(file)
        if storage.is_local(url):
            os.makedirs(os.path.dirname(storage.local_path(url)) or ".", exist_ok=True)
        if suffix == ".json":
            storage.write_json(url, obj)
        elif suffix in _YAML:
            storage.write_bytes(url, documents.dump_yaml(documents.plain(obj)).encode())
        else:
            _save_tensors(obj, url)
        return file

    @staticmethod
    def load(file: File) -> Any:
        url, suffix = os.fspath(file), _suffix(file)
        if suffix == ".json":
            return from_json_safe(storage.read_json(url))
        if suffix in _YAML:
            return documents.parse_yaml(storage.read_bytes(url).decode(), url)
        return load_tensors(url)

    # config -------------------------------------------------------------------------------------------------
    def json(self, file: File) -> None:
        self.config.json(os.fspath(file))

    def jsons(self) -> str:
        return self.config.jsons()

    def yaml(self, file: File) -> None:
        self.config.yaml(os.fspath(file))

    def yamls(self) -> str:
        return self.config.yamls()

    @classmethod
    def from_json(cls, file: File) -> Self:
        return cls._of(Config.from_json(os.fspath(file)))

    @classmethod
    def from_jsons(cls, text: str) -> Self:
        return cls._of(Config.from_jsons(text))

    @classmethod
    def from_yaml(cls, file: File) -> Self:
        return cls._of(Config.from_yaml(os.fspath(file)))

    @classmethod
    def from_yamls(cls, text: str) -> Self:
        return cls._of(Config.from_yamls(text))

    @classmethod
    def _of(cls, config: Config) -> Self:
        """A runner of this class; of the class that the config names, where this one is nobody's own."""
        made: Any = cls
        if cls.__module__.startswith("danling_core.") and config.runner is not None:
            made = import_runner(config.runner)
        runner: Self = made(config)
        return runner

    # from a run ---------------------------------------------------------------------------------------------
    @classmethod
    def from_checkpoint(cls, checkpoint: File) -> Self:
        runner = cls._of(config_of(checkpoint))
        runner.load_pretrained(checkpoint)
        return runner

    def load_config(self, checkpoint: File, overwrite: bool = False) -> None:
        if self._is_open or self.iters:
            raise ConfigError("load_config comes before training: this runner has begun already")
        loaded = config_of(checkpoint)
        if not overwrite:
            ends = dict.fromkeys(_ENDS) if any(name in self._stated for name in _ENDS) else {}
            loaded = Config.from_dict(apply({**loaded.dict(), **ends}, self._stated))
        self._take_config(loaded)
        self.set_seed()

    def _take_config(self, config: Any) -> None:
        """Make this the runner's config, with everything that follows from it."""
        raise NotImplementedError

    def check_dir(self, action: Action = "warn") -> bool:
        if action not in get_args(Action):
            raise ConfigError(f"check_dir: action is {action!r}, wanted one of {', '.join(get_args(Action))}")
        url = self.dir
        with contextlib.suppress(NotFound):
            names = storage.list_names(url)
            if names:
                message = f"the run's folder {url} is not empty: it has {', '.join(sorted(names)[:5])}"
                if action == "raise":
                    raise ConfigError(f"{message}; begin anew with --fresh, or give another dir")
                if action == "warn":
                    warnings.warn(message, stacklevel=2)
                return False
        return True

    def dict(self) -> Values:
        return self.config.dict()


def config_of(checkpoint: File) -> Config:
    """The config of the run that a folder or checkpoint belongs to: `config.yaml` there, or up to four
    folders above.

    Without one, what the checkpoint itself says of it.

    Raises:
        CheckpointError: there is neither.
    """
    folder = os.fspath(checkpoint)
    for _ in range(5):
        url = storage.join(folder, "config.yaml")
        if storage.exists(url):
            return Config.from_yaml(url)
        folder = storage.parent(folder)
        if not folder or folder == storage.parent(folder):
            break
    from danling_core.runner.loading import read

    state = read(checkpoint)
    if not isinstance(state.get("config"), Mapping):
        raise CheckpointError(
            f"{checkpoint} says nothing of its config, and there is no config.yaml beside it"
        )
    return Config.from_dict(state["config"])


def load_tensors(url: str) -> Any:
    """The tensors and plain values in a file, downloaded first where it is remote. Code in it is refused."""
    from danling_core.checkpoints import codec

    if storage.is_local(url):
        return codec.load(storage.local_path(url))
    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        path = os.path.join(folder, "state.pt")
        storage.get_file(url, path)
        return codec.load(path)


def _save_tensors(obj: Any, url: str) -> None:
    """By a file beside it, so that a reader never sees half of one."""
    from danling_core.checkpoints import codec

    with tempfile.TemporaryDirectory(prefix="danling-") as folder:
        path = os.path.join(folder, "state.pt")
        with open(path, "wb") as file:
            codec.dump(obj, file)
        storage.put_file(path, url)


def _suffix(file: File) -> str:
    suffix = PurePosixPath(os.fspath(file)).suffix.lower()
    if suffix not in (*_TENSORS, ".json", *_YAML):
        raise ConfigError(
            f"{os.fspath(file)}: how is {suffix or 'a file without a suffix'} written? Known: {_KNOWN}"
        )
    return suffix

"""Checkpoints and weights taken up by hand, from a run, a file, or a state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from danling_core import storage
from danling_core.checkpoints.codec import load_state
from danling_core.checkpoints.record import is_simple_name
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointError, ConfigError
from danling_core.runner import checkpointing
from danling_core.runner.methods import File
from danling_core.runner.serialization import load_tensors
from danling_core.runs.folder import RunFolder, checkpoints_url, find_checkpoints

if TYPE_CHECKING:
    from danling_core.runner.torch_runner import TorchRunner

_WEIGHTS = ("ema", "model", "state_dict", "model_state_dict")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class LoadedKeys(NamedTuple):
    """What `load_pretrained` could not take over."""

    missing: list[str]
    """Weights of the model that the checkpoint lacks; they are as they were."""
    unexpected: list[str]
    """Weights of the checkpoint that the model lacks, or has in another shape."""


def load(runner: TorchRunner, checkpoint: File | Mapping[str, Any]) -> None:
    """See `RunnerMethods.load_checkpoint`. Collective."""
    state = read(checkpoint)
    if not {"model", "progress", "ranks"} <= set(state):
        raise CheckpointError(
            f"this is no checkpoint of a run, it has {sorted(state)[:5]}: load_pretrained takes weights"
        )
    runner._set_up(runner._default_train_splits(), resume=False)
    checkpointing.apply(runner, state)


def load_pretrained(runner: TorchRunner, checkpoint: File | Mapping[str, Any], strict: bool) -> LoadedKeys:
    """See `RunnerMethods.load_pretrained`."""
    weights = weights_in(read(checkpoint, "best"))
    module = runner.unwrap(runner.model)
    own = module.state_dict()
    fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == getattr(w, "shape", None)}
    keys = LoadedKeys([n for n in own if n not in fitting], [n for n in weights if n not in fitting])
    if not fitting or (strict and (keys.missing or keys.unexpected)):
        raise CheckpointError(
            f"the weights do not fit {type(module).__name__}: missing {keys.missing}, unexpected or of another shape "
            f"{keys.unexpected}; " + ("strict=False takes over what fits" if fitting else "nothing fits")
        )
    module.load_state_dict(fitting, strict=False)
    if runner.ema is not None:
        runner.ema.module.load_state_dict(fitting, strict=False)
    runner._has_weights = True
    return keys


def weights_in(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a checkpoint of ours or of another's making: averaged ones first, without DDP's prefix."""
    found = next((state[name] for name in _WEIGHTS if isinstance(state.get(name), Mapping)), state)
    if found and all(name.startswith("module.") for name in found):
        return {name.removeprefix("module."): weight for name, weight in found.items()}
    return found


def read(checkpoint: File | Mapping[str, Any], name: str = "latest") -> Mapping[str, Any]:
    """The state in a folder of checkpoints, a run's folder, or one file; a mapping is returned as it is.

    Raises:
        CheckpointError: there is none, or it is bad.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    url = os.fspath(checkpoint).rstrip("/")
    if url.lower().endswith(_SUFFIXES) or (storage.is_local(url) and os.path.isfile(storage.local_path(url))):
        state = load_tensors(url)
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{url} holds a {type(state).__name__}, not a state dict")
        return state
    for folder in (_checkpoints_of(url), url):  # a run's own latest.json is no pointer
        store = CheckpointStore(folder)
        record = store.pointed(name) or store.newest_good()[0]
        if record is not None:
            return load_state(store, record, map_location="cpu")
    store, own = CheckpointStore(storage.parent(url)), storage.base_name(url)
    named = [record for record in store.records() if record.name == own]
    record = store.pointed(own) if is_simple_name(own) and not named else next(iter(named), None)
    if record is None:
        raise CheckpointError(f"there is no committed checkpoint at {url}")
    return load_state(store, record, map_location="cpu")


def _checkpoints_of(url: str) -> str:
    """Where the run in this folder has its checkpoints; a config.yaml of another program's says nothing of that."""
    folder = RunFolder(url)
    try:
        return find_checkpoints(folder)
    except ConfigError:
        return checkpoints_url(folder, None)

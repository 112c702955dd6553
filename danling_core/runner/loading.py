"""States, weights and configs of other runs, from a folder, a checkpoint or a file, at any URL."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from danling_core import storage
from danling_core.checkpoints.record import is_simple_name
from danling_core.checkpoints.store import CheckpointStore
from danling_core.config import Config
from danling_core.errors import CheckpointError, ConfigError
from danling_core.runner.objects import File, load_tensors, location
from danling_core.runs.folder import RunFolder, checkpoints_url, find_checkpoints

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS = ("ema", "model", "state_dict", "model_state_dict", "module")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


class LoadedKeys(NamedTuple):
    """Names of the weights that `load_pretrained` left out."""

    missing: list[str]
    """Weights of the model that the checkpoint lacks; they are as they were."""
    unexpected: list[str]
    """Weights of the checkpoint that the model lacks, or has in another shape."""


def whole_state(checkpoint: File | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the whole state of a training in a checkpoint, as `read` finds it.

    Raises:
        CheckpointError: there is none, or it holds weights only.
    """
    state = read(checkpoint)
    if not {"model", "progress"} <= set(state):
        raise CheckpointError(
            f"this is no checkpoint of a run, it has {sorted(state)[:5]}: load_pretrained takes weights"
        )
    return state


def load_weights(
    weights: Mapping[str, Any], module: nn.Module, others: list[nn.Module], strict: bool
) -> LoadedKeys:
    """Put weights into a module, and what fits of them into others like it; return the names left out.

    Raises:
        CheckpointError: with `strict`, weights are missing or unexpected; or nothing fits at all.
    """
    own = module.state_dict()
    fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == getattr(w, "shape", None)}
    keys = LoadedKeys([n for n in own if n not in fitting], [n for n in weights if n not in fitting])
    if not fitting or (strict and (keys.missing or keys.unexpected)):
        raise CheckpointError(
            f"the weights do not fit {type(module).__name__}: missing {keys.missing}, unexpected or of another shape "
            f"{keys.unexpected}; " + ("strict=False takes over what fits" if fitting else "nothing fits")
        )
    for each in (module, *others):
        each.load_state_dict(fitting, strict=False)
    return keys


def weights_in(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights in a checkpoint of ours or of another's making: averaged ones first, without what DDP and
    `torch.compile` put before their names."""
    found = state
    for name in _WEIGHTS:
        if isinstance(state.get(name), Mapping):
            return weights_in(state[name])
    for prefix in ("module.", "_orig_mod."):
        if found and all(name.startswith(prefix) for name in found):
            return weights_in({name.removeprefix(prefix): weight for name, weight in found.items()})
    return found


def read(checkpoint: File | Mapping[str, Any], name: str = "latest") -> Mapping[str, Any]:
    """Return the state in a folder of checkpoints, a run's folder, or one file; a mapping as it is.

    Raises:
        CheckpointError: there is none, or it is bad.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    from danling_core.checkpoints.codec import load_state

    url = location(checkpoint).rstrip("/")
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


def config_of(checkpoint: File | Mapping[str, Any]) -> Config:
    """Return the config of the run that a folder or checkpoint belongs to: `config.yaml` there, or up to four folders
    above; without one, the config in the checkpoint itself. A mapping without a `model` is a config.

    Raises:
        CheckpointError: there is neither.
    """
    if isinstance(checkpoint, Mapping):
        return Config.from_dict(checkpoint["config"] if "model" in checkpoint else checkpoint)
    folder = location(checkpoint)
    for _ in range(5):
        url = storage.join(folder, "config.yaml")
        if storage.exists(url):
            return Config.from_yaml(url)
        folder = storage.parent(folder)
        if not folder or folder == storage.parent(folder):
            break
    state = read(checkpoint)
    if not isinstance(state.get("config"), Mapping):
        raise CheckpointError(
            f"{location(checkpoint)} says nothing of its config, and there is no config.yaml beside it"
        )
    return Config.from_dict(state["config"])


def _checkpoints_of(url: str) -> str:
    """Return where the run in this folder has its checkpoints; a config.yaml of another program says nothing of it."""
    folder = RunFolder(url)
    try:
        return find_checkpoints(folder)
    except ConfigError:
        return checkpoints_url(folder, None)

"""Export of a run's model: weights with a card of facts, or the whole model in a format of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from danling_core import storage
from danling_core.checkpoints import codec
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import ConfigError
from danling_core.runner.loading import config_of, weights_in
from danling_core.runs.folder import RunFolder, find_checkpoints
from danling_core.tools.apart import runner_apart
from danling_core.tools.export.card import model_card
from danling_core.tools.export.formats import FORMATS, Call, difference, noting_call, smaller

_CLOSE = 1e-3
_PRETRAINED = ("tokenizer", "processor", "image_processor", "feature_extractor")


@dataclass
class Exported:
    """Result of an export.

    Args:
        files: their names in the folder, or the one file.
        weights: where they come from.
        difference: of the exported model's outputs from the runner's, over the largest; None where it was not run.
        is_batch_free: the exported model takes batches of another size.
    """

    files: list[str] = field(default_factory=list)
    weights: str = ""
    difference: float | None = None
    is_batch_free: bool = True


def export(
    folder: RunFolder, out: str, *, checkpoint: str = "best", average: int = 1, overrides: Sequence[str] = ()
) -> Exported:
    """Write a run's model: into a folder (weights, config, a card of facts), or a file whose suffix is its format.

    In this process, on the CPU. The averaged weights are taken where there are any. `.safetensors` are weights alone;
    `.pt2` (torch.export), `.onnx` and `.ts` (TorchScript) are the whole model as the run's `infer_step` calls it on the
    first batch of its data; each is loaded again and compared with the runner's.

    Args:
        folder: of the run.
        out: a folder or a file, local or at any URL.
        checkpoint: best, latest, epoch-N.
        average: take the mean of the weights of so many checkpoints, up to that one.
        overrides: of the run's config.

    Raises:
        ConfigError: the format is not known, or cannot hold this model.
        CheckpointError: there is no such checkpoint.
    """
    suffix = PurePosixPath(out).suffix.lower()
    if suffix and suffix not in (".safetensors", *FORMATS):
        raise ConfigError(
            f"--out {out}: give a folder, or a file that ends with .safetensors, {', '.join(FORMATS)}"
        )
    place = storage.join(find_checkpoints(folder), checkpoint)
    config = config_of(folder.url).override(list(overrides))
    with tempfile.TemporaryDirectory(prefix="danling-") as work:
        runner = runner_apart(config, work, compile=False, device="cpu")
        runner.load_pretrained(place)
        model = runner.unwrap(runner.model)
        found = Exported(weights=f"checkpoint {checkpoint}")
        if average > 1:
            names = _average(CheckpointStore(find_checkpoints(folder)), checkpoint, average, model)
            found.weights = f"mean of the checkpoints {', '.join(names)}"
        made = Path(work) / "export"
        made.mkdir()
        is_pretrained = False
        if suffix in FORMATS:
            _write_model(runner, model, made / f"model{suffix}", suffix, found)
        else:
            is_pretrained = _write_weights(runner, model, made, alone=bool(suffix))
        if suffix:
            storage.put_file(str(made / f"model{suffix}"), out)
            found.files = [out]
            return found
        config.yaml(str(made / "config.yaml"))
        count = sum(parameter.numel() for parameter in model.parameters())
        kind = type(model).__name__ if is_pretrained else None
        (made / "README.md").write_text(model_card(config, folder, found.weights, count, kind))
        found.files = _put_all(made, out)
    return found


def _write_weights(runner: Any, model: nn.Module, made: Path, *, alone: bool) -> bool:
    """Write the weights; return whether the model did so itself, in the format of its `from_pretrained`.

    Args:
        alone: into one file of them, and nothing else.
    """
    save = getattr(model, "save_pretrained", None)
    if alone or not callable(save):
        runner.save(model.state_dict(), str(made / "model.safetensors"))
        return False
    save(made)  # of transformers: weights and config.json, which its from_pretrained reads
    for name in _PRETRAINED:
        save_beside = getattr(getattr(runner, name, None), "save_pretrained", None)
        if callable(save_beside):
            save_beside(made)
    return True


def _write_model(runner: Any, model: nn.Module, path: Path, suffix: str, found: Exported) -> None:
    model.eval()
    call = _first_call(runner, model)
    try:
        with torch.no_grad():
            exported = FORMATS[suffix](model, call, path)
    except ConfigError:
        raise
    except Exception as error:  # of torch's exporters, of many kinds
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{type(model).__name__} cannot be written as {suffix}: {type(error).__name__}: {first}"
        ) from error
    if exported is None:
        return
    found.difference = difference(model, exported, call)
    if not found.difference <= _CLOSE:
        raise ConfigError(
            f"the model in {suffix} gives other outputs than the runner's, by {found.difference:.2g} of the largest: "
            "its forward depends on more than its inputs"
        )
    try:
        found.is_batch_free = difference(model, exported, smaller(call)) <= _CLOSE
    except Exception:  # the format refuses another size
        found.is_batch_free = False


def _first_call(runner: Any, model: nn.Module) -> Call:
    """Return the arguments of the model's call on the first batch of the data."""
    names = list(runner.datasets | runner.dataloaders)
    ordered = sorted(names, key=lambda name: not name.startswith(("infer", "test")))
    if not ordered:
        raise ConfigError("the runner has no data: there is no batch to call the model with")
    calls: list[Call] = []
    with noting_call(model, calls):
        next(runner.predictions(ordered[0]), None)
    if not calls:
        raise ConfigError(f"infer_step did not call self.model on the first batch of split {ordered[0]!r}")
    return calls[0]


def _average(store: CheckpointStore, last: str, count: int, model: nn.Module) -> list[str]:
    """Give a model the mean of the weights of the newest checkpoints up to `last`; return their names.

    Numbers that are no floats (counters of BatchNorm) are those of the last. Statistics of BatchNorm are averaged, too.
    """
    records = store.records()
    pointed = store.pointed(last) or next((each for each in records if each.name == last), None)
    if pointed is None:
        raise ConfigError(f"there is no checkpoint {last!r}")
    known = sorted((each for each in records if each.step <= pointed.step), key=lambda each: each.step)
    chosen = known[-count:]
    if len(chosen) < count:
        raise ConfigError(
            f"--average {count}: the run has {len(chosen)} checkpoint(s) up to {last!r}; train with "
            f"keep_last={count} or save_interval=1 to keep more"
        )
    sums: dict[str, torch.Tensor] = {}
    for record in chosen:
        weights = _floats(weights_in(codec.load_state(store, record)))
        sums = {name: sums.get(name, 0) + weight for name, weight in weights.items()}
    own = model.state_dict()
    means = {name: (total / count).to(own[name].dtype) for name, total in sums.items() if name in own}
    model.load_state_dict(means, strict=False)
    return [record.name for record in chosen]


def _floats(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: weight.double()
        for name, weight in weights.items()
        if isinstance(weight, torch.Tensor) and weight.is_floating_point()
    }


def _put_all(made: Path, out: str) -> list[str]:
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    for name in names:
        url = storage.join(out, *name.split(os.sep))
        if storage.is_local(url):
            Path(storage.local_path(url)).parent.mkdir(parents=True, exist_ok=True)
        storage.put_file(str(made / name), url)
    return names

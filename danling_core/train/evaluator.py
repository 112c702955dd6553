"""Exact evaluation and inference: each sample once, one reduction, at any world size."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import IterableDataset

from danling_core.data.batches import batch_size_of, to_cpu, to_device
from danling_core.data.pass_loader import PassLoader
from danling_core.data.round_robin import RoundRobinBatches
from danling_core.errors import ConfigError, RunInterrupted
from danling_core.metrics import Additive
from danling_core.metrics.states import has_list_state
from danling_core.parallel import distributed
from danling_core.results.values import as_floats, flatten
from danling_core.train.logged import merged, values_of
from danling_core.train.meters import LossMeter, SplitMeter


class Evaluator:
    """Goes over a split without training, and adds up over the ranks what was counted.

    Args:
        device: where batches go.
        is_stop_requested: asked before each batch.
        beat: called at each batch, to show that this rank is alive.
    """

    def __init__(
        self, device: torch.device, *, is_stop_requested: Callable[[], bool], beat: Callable[[], None]
    ) -> None:
        self._device = device
        self._is_stop_requested = is_stop_requested
        self._beat = beat
        self._left_early = False

    def evaluate(
        self,
        loader: Iterable[Any],
        step: Callable[[Any], Any],
        meter: SplitMeter,
        size_of: Callable[[Any], int] | None = None,
        *,
        most: int | None = None,
    ) -> int:
        """Call `step` with each batch, and count its loss in `meter`, weighted by what the sampler says of its size.

        Leaves early where a stop was requested: the next `reduce` raises then, on every rank.

        Args:
            most: batches to evaluate; None for all.

        Returns:
            how many were evaluated.
        """
        self._left_early = False
        counts = loader.counts() if size_of is None and isinstance(loader, PassLoader) else None
        size_of = size_of or batch_size_of
        seen = 0
        for batch in itertools.islice(loader, most):
            self._beat()
            if self._is_stop_requested():
                self._left_early = True
                break
            seen += 1
            count = meter.batch_size = size_of(batch) if counts is None else next(counts)
            loss = loss_of(step(to_device(batch, self._device, non_blocking=True)))
            if loss is not None:
                meter.add(loss.detach(), count)
        return seen

    def reduce(
        self,
        meter: SplitMeter,
        metrics: Any,
        losses: Mapping[str, LossMeter] = MappingProxyType({}),
        *,
        must_count: bool = False,
    ) -> dict[str, Any]:
        """Return loss, logged values and metrics over all ranks, in one reduction. Collective.

        Where a rank has logged values, there is a second one, for these. What this rank counted stays as it is.

        Args:
            losses: those of other optimizers, which are called `loss_{name}`.
            must_count: refuse a metric that was given no batch.

        Returns:
            nothing where nothing was counted.

        Raises:
            RunInterrupted: some rank left the evaluation early.
            ConfigError: a metric was given no batch, where it must count.
        """
        meters = {"loss": meter, **{f"loss_{name}": each for name, each in losses.items()}}
        for each in meters.values():
            each.flush()
        additive = metrics if isinstance(metrics, Additive) else None
        left, self._left_early = self._left_early, False
        counted = [number for each in meters.values() for number in (each.total, float(each.count))]
        lacks_samples = float(meter.count == 0 and has_list_state(metrics))
        flags = [float(left), lacks_samples, float(bool(meter.logged))]
        sums = torch.tensor([*flags, *counted], dtype=torch.float64)
        own = additive.state() if additive is not None else sums.new_zeros(0)
        joined = distributed.all_reduce_sum(torch.cat([sums, own.cpu()]))
        stops, lacking, has_logged, *counted = joined[: len(sums)].tolist()
        if stops:
            raise RunInterrupted("asked to stop: the evaluation was left, and is done again by a resume")
        if lacking:
            raise ConfigError(
                f"{int(lacking)} rank(s) had no sample of this split, and a metric of torchmetrics that keeps lists "
                "cannot be reduced then: use fewer ranks or more samples, or give the metric thresholds"
            )
        pairs = zip(meters, zip(counted[::2], counted[1::2], strict=True), strict=True)
        result: dict[str, Any] = {name: total / count for name, (total, count) in pairs if count}
        if has_logged:
            states = distributed.all_gather_objects(meter.logged.state_dict())
            result = joined_values(result, values_of(merged(states)))
        if additive is not None:
            additive.load_state(joined[len(sums) :])
        values = computed(metrics)
        if additive is not None:
            additive.load_state(own)
        unseen = [name for name, value in flatten(values).items() if math.isnan(value)]
        if must_count and unseen and additive is not None and not joined[len(sums) :].any():
            raise ConfigError(
                f"metric {unseen[0]!r} has counted nothing: call self.update_metrics(pred, target) in evaluate_step, "
                "or set self.metrics to None"
            )
        return joined_values(result, values)

    def outputs(
        self, loader: Iterable[Any], step: Callable[[Any], Any], most: int | None = None
    ) -> Iterator[Any]:
        """Yield the outputs of this rank's batches, one by one, on the CPU."""
        for batch in itertools.islice(loader, most):
            self._beat()
            yield to_cpu(step(to_device(batch, self._device, non_blocking=True)))

    def joined(self, outputs: list[Any], loader: Iterable[Any]) -> Any:
        """Return the outputs of all ranks in data set order, concatenated where they are tensors. Collective.

        Args:
            outputs: of this rank's batches of `loader`.
        """
        parts = distributed.all_gather_objects(outputs)
        if _interleaves(loader):
            rounds = max(len(part) for part in parts)
            ordered = [part[i] for i in range(rounds) for part in parts if i < len(part)]
        else:
            ordered = [output for part in parts for output in part]
        return _concatenated(ordered)


def loss_of(returned: Any) -> torch.Tensor | None:
    """Return the loss in what an `evaluate_step` returned: `(prediction, loss)`, or a mapping with a `loss`.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(returned, Mapping):
        loss = returned.get("loss")
    elif isinstance(returned, tuple) and len(returned) == 2:
        loss = returned[1]
    else:
        raise ConfigError(
            f"evaluate_step returned a {type(returned).__name__}, wanted (prediction, loss), or a mapping with a 'loss'"
        )
    if loss is not None and not isinstance(loss, torch.Tensor):
        raise ConfigError(
            f"evaluate_step returned a {type(loss).__name__} as the loss, wanted a tensor or None"
        )
    return loss


def joined_values(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return losses, logged values and metrics as one mapping. Raises ConfigError where one name means two."""
    if twice := sorted(known.keys() & more.keys()):
        raise ConfigError(
            f"two values are called {twice[0]!r}: losses, metrics and what self.log names need different names"
        )
    return {**known, **more}


def name_of(metric: Any) -> str:
    """Return the name of a metric that stands alone: its class, as `mean_squared_error`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()


def computed(metrics: Any) -> dict[str, Any]:
    """Return what metrics compute, as plain numbers by name; a single value is named after its class."""
    if metrics is None:
        return {}
    value = metrics.compute()
    if not isinstance(value, Mapping):
        value = {name_of(metrics): value}
    return {str(name): as_floats(item, str(name)) for name, item in value.items()}


def _concatenated(outputs: list[Any]) -> Any:
    """Join the outputs of batches: tensors are concatenated, also inside mappings and (named) tuples.

    What differs from batch to batch in more than its first dimension stays a list, with an element for each batch.
    """
    if not outputs:
        return outputs
    first = outputs[0]
    if all(isinstance(output, torch.Tensor) and output.dim() for output in outputs):
        return torch.cat(outputs) if len({output.shape[1:] for output in outputs}) == 1 else outputs
    if isinstance(first, dict) and all(output.keys() == first.keys() for output in outputs):
        return {key: _concatenated([output[key] for output in outputs]) for key in first}
    if isinstance(first, tuple) and all(len(output) == len(first) for output in outputs):
        parts = [_concatenated(list(each)) for each in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return outputs


def _interleaves(loader: Any) -> bool:
    """Return whether the ranks take batches in turn: of iterable data and users' loaders; else contiguous parts."""
    return isinstance(loader, RoundRobinBatches) or isinstance(
        getattr(loader, "dataset", None), IterableDataset
    )

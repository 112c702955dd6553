"""The data of all splits: their streams for training, their loaders for evaluation, and their lengths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader

from danling_core.config import Config
from danling_core.data.given_data import GivenData, GivenSplit
from danling_core.data.lengths import Lengths
from danling_core.data.loaders import build_evaluate_loader, build_train_loader
from danling_core.data.round_robin import RoundRobinBatches
from danling_core.data.samplers import GlobalBatchSampler
from danling_core.data.source import Source
from danling_core.data.stream import TrainStream
from danling_core.data.user_loader import length_of
from danling_core.errors import ConfigError
from danling_core.parallel import distributed
from danling_core.parallel.ranks import Ranks
from danling_core.suggest import nearest

logger = logging.getLogger("danling")
Splits = Sequence[str] | str


class DataSplits:
    """Makes each split's loader when it is first needed, and shows it in `dataloaders`.

    Args:
        config: with `dataloader`, `evaluate_splits`, `accum_steps` and `steps_per_epoch`.
        ranks: over which the data is spread.
        device_type: where batches go: cpu or cuda.
        collate_fn: returns the user's function that makes a batch of samples, or None. Asked when a loader is made.
        size_of: returns the user's function that counts the samples of a batch, or None. Asked likewise.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        device_type: str,
        *,
        collate_fn: Callable[[], Callable[[Any], Any] | None],
        size_of: Callable[[], Callable[[Any], int] | None],
    ) -> None:
        self.datasets: dict[str, Any] = {}
        self.datasamplers: dict[str, Any] = {}
        self.dataloaders: dict[str, Any] = {}
        self.streams: dict[str, TrainStream] = {}
        """Split to what is trained on, once it is needed."""
        self.trained: tuple[str, ...] = ()
        """The splits that this run trains on, once that is known."""
        self._config = config
        self._ranks = ranks
        self._device_type = device_type
        self._collate_fn = collate_fn
        self._size_of = size_of
        self._evaluate_loaders: dict[str, Any] = {}
        self._evaluated: list[Any] = []
        """Data sets and loaders of the user's that evaluations read."""
        self._made: dict[str, tuple[Any, Any]] = {}
        """Split to the loader and sampler that were made here, to tell them from the user's."""
        self._begun: dict[str, Source] = {}
        """Split to what its stream was made of."""
        self._known_lengths: Lengths | None = None
        self.given = GivenData(self._given_splits, is_main=ranks.is_main_process)

    def take_data(self, other: DataSplits) -> None:
        """Take over the user's data, samplers and loaders of `other`, and nothing that was made there."""
        self.datasets, self.datasamplers, self.dataloaders = (
            other.datasets,
            other.datasamplers,
            other.dataloaders,
        )
        for split in other._made:
            loader, sampler = other._given(split)
            for shown, own in ((self.dataloaders, loader), (self.datasamplers, sampler)):
                if own is None:
                    shown.pop(split, None)

    # names --------------------------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        """Return all splits that have data."""
        return list(self.datasets | self.dataloaders)

    def to_train(self, wanted: Splits | None = None) -> list[str]:
        """Return the wanted splits; by default those named `train...`. Raises ConfigError for one without data."""
        return self.known(wanted, [split for split in self.names if split.startswith("train")])

    def to_evaluate(self, wanted: Splits | None = None, trained: Sequence[str] | None = None) -> list[str]:
        """Return the wanted splits; by default all but the trained ones, `test...` and `infer...`.

        Raises:
            ConfigError: a split has no data.
        """
        trained = self.to_train() if trained is None else trained
        others = [s for s in self.names if s not in trained and not s.startswith(("test", "infer"))]
        return self.known(wanted, others)

    def known(self, wanted: Splits | None, default: Sequence[str] = ()) -> list[str]:
        """Return the wanted splits, or the default, as a list. Raises ConfigError for one without data."""
        splits = [wanted] if isinstance(wanted, str) else list(default if wanted is None else wanted)
        for split in splits:
            if split not in self.names:
                raise ConfigError(f"split {split!r} has no data: the runner has {self.names}")
        return splits

    def check(self, to_train: Sequence[str], to_evaluate: Sequence[str]) -> None:
        """Refuse to train nothing, and keys of the config that would have no effect on what is trained.

        Raises:
            ConfigError: says what to do.
        """
        config = self._config
        self.check_names()
        if not to_train:
            raise ConfigError(
                f"there is no split to train on: the runner has {self.names}; call one `train`, or name it: "
                "train(['fit'])"
            )
        if len(to_train) > 1 and config.evaluate_interval_steps is not None:
            raise ConfigError(
                f"evaluate_interval_steps goes with one split to train on, found {list(to_train)}: leave it out, or "
                "make one data set of them (torch.utils.data.ConcatDataset)"
            )
        if not to_evaluate and config.patience is not None and config.score_split is None:
            raise ConfigError(
                f"patience is {config.patience}, and no split is evaluated, so that it would count the training loss: "
                "give a split to evaluate, or score_split, or leave patience out"
            )
        if not to_evaluate and config.evaluate_every > 1:
            raise ConfigError(
                "evaluate_every has no effect: no split is evaluated; leave it out, or give one"
            )
        self._check_loader_keys()

    def check_reach(self, step_end: int | None) -> None:
        """Refuse an end that comes before the last of the trained splits begins. Raises ConfigError."""
        if step_end is None or self._config.epoch_end is not None:
            return
        accum, steps = self._config.accum_steps, 0
        for split, after in zip(self.trained, self.trained[1:], strict=False):
            length = self.stream(split).batches_per_pass
            steps += 0 if length is None else -(-length // accum)
            if steps >= step_end:
                raise ConfigError(
                    f"the run ends before {after!r} begins: {split!r} has {steps} steps, and step_end is "
                    f"{step_end}; train longer, use epoch_end, or leave that split out"
                )

    def _check_loader_keys(self) -> None:
        """Refuse loader keys for splits whose loaders the user makes: two sweeps would train the same thing."""
        stated = self._config.canonical().get("dataloader", {})
        own = [split for split in self.names if self._given(split)[0] is not None]
        for key in stated:
            where = f"dataloader.{key}"
            if key in self.names and key in own:
                raise ConfigError(
                    f"{where} has no effect: the runner makes the loader of {key!r}; take it out"
                )
            if key not in self.names and len(own) == len(self.names):
                raise ConfigError(
                    f"{where} has no effect, since the runner makes the loaders of all splits: take it out, or give "
                    "data sets in self.datasets"
                )

    def check_names(self) -> None:
        """Raise ConfigError where the config names a split that has no data."""
        config, known = self._config, self.names
        for place, names in (
            ("evaluate_splits", config.evaluate_splits or ()),
            ("dataloader", config.dataloader.__pydantic_extra__ or ()),
            ("limit_batches", config.limit_batches),
        ):
            for name in names:
                if name not in known:
                    near = nearest(name, known)
                    hint = f": did you mean {near!r}?" if near else ""
                    raise ConfigError(f"{place} names split {name!r}, and the runner has {known}{hint}")

    # sizes --------------------------------------------------------------------------------------------------
    def batch_size_of(self, split: str | None = None) -> int:
        """Return the samples in a batch of one rank, of a split or, without one, in training."""
        trained = (*self.trained, *self.to_train(), "train")
        name = trained[0] if split is None else split
        own = getattr(self._given(name)[0], "batch_size", None)
        is_trained = name in trained
        options = self._config.dataloader.for_split(name, training=is_trained, trained=is_trained)
        return own or options.batch_size

    @property
    def batch_size_equivalent(self) -> int:
        return self.batch_size_of() * self._ranks.world_size * self._config.accum_steps

    def lengths(self) -> Lengths:
        """Return the length of one pass over the training data. Makes its streams; collective for a user's loader."""
        if self._known_lengths is not None:
            return self._known_lengths
        splits = self.trained or self.to_train()
        accum, per_epoch = self._config.accum_steps, self._config.steps_per_epoch
        batches = [self.stream(split).batches_per_pass for split in splits]
        sized = [n for n in batches if n is not None]
        if not splits or len(sized) < len(batches):
            lengths = Lengths(None, None, accum, per_epoch)
        else:
            lengths = Lengths(sum(sized), sum(-(-n // accum) for n in sized), accum, per_epoch)
        if self.trained:
            self._known_lengths = lengths
        return lengths

    def batch_sampler(self, split: str) -> GlobalBatchSampler | None:
        """Return the sampler that cuts a training split into batches; None where it is not one of ours."""
        sampler = getattr(self.stream(split).loader, "global_batches", None)
        return sampler if isinstance(sampler, GlobalBatchSampler) else None

    def length_of(self, split: str) -> int | None:
        """Return the batches of a pass over a split, on this rank; None where that is not known, or no loader yet."""
        if split in self.streams:
            return self.streams[split].batches_per_pass
        loader = self._evaluate_loaders.get(split)
        return None if loader is None else length_of(loader)

    # loaders ------------------------------------------------------------------------------------------------
    def stream(self, split: str) -> TrainStream:
        """Return the split's training stream, made at the first call."""
        if split in self.streams:
            return self.streams[split]
        ranks, loader = self._ranks, self._given(split)[0]
        if loader is None:
            options = self._config.dataloader.for_split(split, training=True)
            if self._config.overfit_batches is not None:
                options = replace(options, shuffle=False)
            loader = build_train_loader(self.datasets[split], options, **self._loader_arguments(split))
            self._show(split, loader)
        elif ranks.distributed and not getattr(getattr(loader, "dataset", None), "sharded", False):
            logger.info(
                "split %r comes from a loader of your own: each rank reads what it gives there", split
            )
        self._begun[split] = self._source(split)
        self.streams[split] = TrainStream(
            loader,
            accum_steps=self._config.accum_steps,
            world_size=ranks.world_size,
            rank=ranks.rank,
            reduce=distributed.reduce_floats if ranks.distributed else None,
            size_of=self._size_of(),
            seed=self._config.seed,
            batches_are_copied=self._device_type != "cpu",
        )
        self._keep_sources_apart()
        self.streams[split].limit = self._limit_of(split, self.streams[split].batches_per_pass)
        return self.streams[split]

    def most(self, split: str) -> int | None:
        """Return the most batches of an evaluation on this rank, or None for all."""
        return self._limit_of(split, length_of(self.evaluate_loader(split)))

    def _limit_of(self, split: str, length: int | None) -> int | None:
        limit = self._config.limit_of(split)
        if limit is None or isinstance(limit, int):
            return limit
        if length is None:
            raise ConfigError(
                f"limit_batches.{split} is {limit}, a fraction, and the data has no length: give a number of batches"
            )
        return max(1, int(limit * length))

    def evaluate_loader(self, split: str) -> Any:
        """Return the split's loader for evaluation and inference, made at the first call."""
        if split in self._evaluate_loaders:
            return self._evaluate_loaders[split]
        ranks, loader = self._ranks, self._given(split)[0]
        if loader is None:
            is_trained = split in self.streams
            options = self._config.dataloader.for_split(split, training=False, trained=is_trained)
            self._evaluated.append(self.datasets[split])
            loader = build_evaluate_loader(self.datasets[split], options, **self._loader_arguments(split))
            if not is_trained:
                self._show(split, loader)
        else:
            seed = self._config.seed
            self._evaluated += [loader, getattr(loader, "dataset", loader)]
            loader = RoundRobinBatches(loader, rank=ranks.rank, world_size=ranks.world_size, seed=seed)
        self._evaluate_loaders[split] = loader
        self._keep_sources_apart()
        return loader

    def _keep_sources_apart(self) -> None:
        """Have no training stream go by the state of what an evaluation reads, too: it would be the evaluation's."""
        evaluated = {id(data) for data in self._evaluated}
        for stream in self.streams.values():
            data = getattr(stream.loader, "dataset", None)
            if not evaluated.isdisjoint(map(id, (stream.loader, data, getattr(data, "dataset", data)))):
                stream.source = None
                stream.go_by_state(False)

    def check_unchanged(self, split: str) -> None:
        """Refuse a training split whose data, sampler or loader is another one than when training began.

        Raises:
            ConfigError: says which; what is trained would be the old one.
        """
        begun = self._begun.get(split)
        what = None if begun is None else begun.what_differs(self._source(split))
        if what is not None:
            raise ConfigError(
                f"{what} of split {split!r} is another one than when training began, and training would go on with "
                "what it was: set it before train(). To train on other samples in another epoch, give a sampler, or a "
                "data set with set_epoch"
            )

    def _source(self, split: str) -> Source:
        return Source(*self._given(split), self.datasets.get(split))

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Return where each training stream is: equal on all ranks."""
        return {split: stream.state_dict() for split, stream in self.streams.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go to where `state_dict` was taken; `take_up` follows."""
        for split, position in state.items():
            if split in self.streams:
                self.streams[split].load_state_dict(position)

    def source_states(self) -> dict[str, Any] | None:
        """Return where the sources of this rank's training streams are, of those that go by it."""
        found = {split: stream.source_state() for split, stream in self.streams.items()}
        return {split: state for split, state in found.items() if state is not None} or None

    def take_up(self, source_states: Mapping[str, Any]) -> list[str]:
        """Make the iterators where `load_state_dict` said; return the splits that are not where they were."""
        return [
            split for split, stream in self.streams.items() if not stream.take_up(source_states.get(split))
        ]

    def take_trial(self, split: str, found: Mapping[str, Any], *, goes_by_state: bool) -> None:
        """Take over what a trial found of a training split: facts, and whether its source's state can be relied on."""
        self.given.note(split, found)
        self.streams[split].go_by_state(goes_by_state)

    def close(self) -> None:
        """End the loaders' worker processes. The loaders can be used again."""
        self._evaluate_loaders.clear()
        for loader, _ in self._made.values():
            loader._iterator = None

    def _given(self, split: str) -> tuple[Any, Any]:
        """Return the loader and the sampler that the user gave for a split, or None for each."""
        loader, sampler = self.dataloaders.get(split), self.datasamplers.get(split)
        made_loader, made_sampler = self._made.get(split, (None, None))
        if isinstance(self.datasets.get(split), DataLoader):
            loader, made_loader = self.datasets[split], None
        return None if loader is made_loader else loader, None if sampler is made_sampler else sampler

    def _given_splits(self) -> dict[str, GivenSplit]:
        found = {}
        for split in self.names:
            loader, sampler = self._given(split)
            data = self.datasets[split] if loader is None else getattr(loader, "dataset", loader)
            stated = self._config.dataloader.for_split(split, training=True).num_workers
            workers = stated if loader is None else getattr(loader, "num_workers", 0)
            found[split] = GivenSplit(loader, sampler, data, workers)
        return found

    def _show(self, split: str, loader: Any) -> None:
        sampler = self._given(split)[1]
        made = getattr(loader, "batch_sampler", None) if sampler is None else None
        self._made[split] = loader, made
        self.dataloaders[split] = loader
        self.datasamplers[split] = made if sampler is None else sampler

    def _loader_arguments(self, split: str) -> dict[str, Any]:
        return {
            "rank": self._ranks.rank,
            "world_size": self._ranks.world_size,
            "seed": self._config.seed,
            "collate_fn": self._collate_fn(),
            "sampler": self._given(split)[1],
            "device_type": self._device_type,
        }

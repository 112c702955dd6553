"""The data side of a torch runner: loaders made from data sets, or the user's own, for training and
evaluation."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from danling_core.data import TrainStream, build_evaluate_loader, build_train_loader
from danling_core.data.dealt import DealtBatches
from danling_core.parallel import distributed
from danling_core.runner.base_runner import BaseRunner
from danling_core.train.lengths import Lengths


class TorchData(BaseRunner):
    """Makes each split's loader when it is first needed, and keeps it in `dataloaders`."""

    _streams: dict[str, TrainStream]
    _evaluate_loaders: dict[str, Any]
    _made: dict[str, tuple[Any, Any]]
    """Split to the loader and sampler that the runner made, to tell them from given ones."""
    _train_splits: tuple[str, ...]
    _known_lengths: Lengths | None

    def _init_data(self) -> None:
        self._streams, self._evaluate_loaders, self._made = {}, {}, {}
        self._train_splits, self._known_lengths = (), None

    @property
    def batch_size(self) -> int:
        splits = self._train_splits or tuple(self._default_train_splits()) or ("train",)
        own = getattr(self._given(splits[0])[0], "batch_size", None)
        return own or self.config.dataloader.for_split(splits[0], training=True).batch_size

    @property
    def batch_size_equivalent(self) -> int:
        return self.batch_size * self.world_size * self.accum_steps

    @property
    def _lengths(self) -> Lengths:
        if self._known_lengths is not None:
            return self._known_lengths
        splits = self._train_splits or self._default_train_splits()
        accum, per_epoch = self.accum_steps, self.config.steps_per_epoch
        batches = [self._stream(split).batches_per_pass for split in splits]
        sized = [n for n in batches if n is not None]
        if not splits or len(sized) < len(batches):
            lengths = Lengths(None, None, accum, per_epoch)
        else:
            lengths = Lengths(sum(sized), sum(-(-n // accum) for n in sized), accum, per_epoch)
        if self._train_splits:
            self._known_lengths = lengths
        return lengths

    def _given(self, split: str) -> tuple[Any, Any]:
        """The loader and the sampler that the user gave for a split, or None for each."""
        loader, sampler = self.dataloaders.get(split), self.datasamplers.get(split)
        made_loader, made_sampler = self._made.get(split, (None, None))
        if isinstance(self.datasets.get(split), DataLoader):
            loader, made_loader = self.datasets[split], None
        return None if loader is made_loader else loader, None if sampler is made_sampler else sampler

    def _keep(self, split: str, loader: Any) -> None:
        """Show a loader that was just made."""
        sampler = self._given(split)[1]
        made = getattr(loader, "batch_sampler", None) if sampler is None else None
        self._made[split] = loader, made
        self.dataloaders[split] = loader
        self.datasamplers[split] = made if sampler is None else sampler

    def _stream(self, split: str) -> TrainStream:
        if split in self._streams:
            return self._streams[split]
        loader = self._given(split)[0]
        if loader is None:
            options = self.config.dataloader.for_split(split, training=True)
            loader = build_train_loader(self.datasets[split], options, **self._loader_arguments(split))
            self._keep(split, loader)
        elif self.distributed and not getattr(getattr(loader, "dataset", None), "sharded", False):
            self.logger.info(
                "split %r comes from a loader of your own: each rank reads what it gives there", split
            )
        self._streams[split] = TrainStream(
            loader,
            accum_steps=self.accum_steps,
            world_size=self.world_size,
            rank=self.rank,
            reduce=distributed.reduce_floats if self.distributed else None,
            size_of=self.size_of,
            seed=self.seed,
        )
        return self._streams[split]

    def _evaluate_loader(self, split: str) -> Any:
        if split in self._evaluate_loaders:
            return self._evaluate_loaders[split]
        loader = self._given(split)[0]
        if loader is None:
            options = self.config.dataloader.for_split(split, training=False, trained=split in self._streams)
            loader = build_evaluate_loader(self.datasets[split], options, **self._loader_arguments(split))
            if split not in self._streams:
                self._keep(split, loader)
        else:
            loader = DealtBatches(loader, rank=self.rank, world_size=self.world_size, seed=self.seed)
        self._evaluate_loaders[split] = loader
        return loader

    def _loader_arguments(self, split: str) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "seed": self.seed,
            "collate_fn": self.collate_fn,
            "sampler": self._given(split)[1],
            "device_type": self.device.type,
        }

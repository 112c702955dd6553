"""A trial of the data before training, in a fork: what cannot be read twice alike is said, or refused, at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from danling_core.checkpoints.plain import to_plain
from danling_core.data.facts import facts_of
from danling_core.data.pass_loader import PassLoader
from danling_core.data.stream import TrainStream
from danling_core.data.trial import (
    counts_its_passes,
    is_common,
    needs_trial,
    read_twice,
    state_leads_back,
)
from danling_core.errors import ConfigError
from danling_core.parallel import distributed
from danling_core.runner import aside
from danling_core.runner.parts import Parts

logger = logging.getLogger("danling")
_LIMIT_SECONDS = 30.0
_SEED_IT = (
    "seed its shuffle, alike on all ranks (`seed=0`; for WebDataset `.shuffle(1000, rng=random.Random(0))`, "
    "`detshuffle=True, seed=0` for its shards)"
)


def try_data(parts: Parts, train_splits: Sequence[str], evaluate_splits: Sequence[str]) -> None:
    """Try the data that only a trial can tell about; see `needs_trial`. Collective; `sanity_batches: 0` leaves it out.

    Raises:
        ConfigError: ranks read different samples, where each keeps its part of the same ones.
    """
    splits, ranks = parts.splits, parts.ranks
    if ranks.is_main_process:
        _tell_unseeded(parts, train_splits)
        _note_content(parts, train_splits)
    trained = {split: splits.stream(split) for split in train_splits}
    loaders = {split: stream.loader for split, stream in trained.items()}
    if ranks.distributed:  # one rank evaluates what it reads, in any order
        others = {split: splits.evaluate_loader(split) for split in evaluate_splits if split not in loaders}
        loaders |= {split: getattr(each, "loader", each) for split, each in others.items()}
    loaders = {split: each for split, each in loaders.items() if needs_trial(each)}
    if not loaders or not parts.config.sanity_batches or not aside.can_fork(torch.device("cpu")):
        return
    found = {}
    for split, loader in loaders.items():
        found[split] = aside.in_a_fork(
            partial(_try, loader, trained.get(split), parts.config.seed),
            parts.session.beat,
            _LIMIT_SECONDS,
            f"the trial of the data of split {split!r}",
        )
    on_all = distributed.all_gather_objects(found)
    for split, loader in loaders.items():
        results = [each[split] for each in on_all]
        if None not in results:
            _conclude(parts, split, loader, results, splits.streams.get(split) if split in trained else None)


def _tell_unseeded(parts: Parts, train_splits: Sequence[str]) -> None:
    """Warn of generators that nobody seeded. Rank 0."""
    for split, path in parts.splits.given.unseeded().items():
        if split in train_splits:
            logger.warning(
                "split %r holds a generator that was given no seed (%s): each start of this run draws other numbers, "
                "and a resume may; give it one, as .shuffle(seed=0, ...) or np.random.default_rng(0)",
                *(split, path),
            )


def _note_content(parts: Parts, train_splits: Sequence[str]) -> None:
    """Note a hash of some samples of data that loader workers read, whose files only a fork may open. Rank 0."""
    for split, data in parts.splits.given.read_by_workers().items():
        if split in train_splits and parts.config.sanity_batches and aside.can_fork(torch.device("cpu")):
            content = aside.in_a_fork(
                lambda data=data: facts_of(data)["content"],  # type: ignore[misc]
                parts.session.beat,
                _LIMIT_SECONDS,
                f"a look at the data of split {split!r}",
            )
            parts.splits.given.note(split, {"content": content})


def take_up_data(parts: Parts, source_states: Mapping[str, Any]) -> None:
    """Go to the saved positions: by the state of a source that leads back to its last window, as a fork finds out, else
    by reading up to them. Any rank by itself."""
    streams, reliable = parts.splits.streams, {}
    for split, state in source_states.items():
        if split in streams:
            leads_back = aside.can_fork(torch.device("cpu")) and aside.in_a_fork(
                partial(streams[split].leads_back, state),
                parts.session.beat,
                _LIMIT_SECONDS,
                f"the trial of the state of split {split!r}",
            )
            if leads_back:
                reliable[split] = state
                continue
            streams[split].go_by_state(False)
            logger.info(
                "split %r: the saved state of its data does not lead back to the same batch: it is read up to the "
                "position again",
                split,
            )
            number = streams[split].state_dict()["pass"]
            if number and counts_its_passes(streams[split].loader):
                parts.setup.not_bitwise(
                    f"split {split!r} is read again in its pass {number}, and its data has no set_epoch to know that by"
                )
    for split in parts.splits.take_up(reliable):
        parts.setup.not_bitwise(f"split {split!r}: its data gave another batch than a moment before")


def _try(loader: Any, stream: TrainStream | None, seed: int) -> dict[str, Any] | None:
    if getattr(loader, "pin_memory", False) is True:  # a fork must not touch the GPU
        loader.pin_memory = False
    try:
        if stream is None:
            return read_twice(loader, seed)
        found = read_twice(loader, stream.pass_seed(0))
    except Exception as error:  # data that cannot be read says so when it is trained on
        logger.info("the data could not be tried before the first step: %s: %s", type(error).__name__, error)
        return None
    leads_back, refused = False, ""
    if stream.source is not None:
        try:
            to_plain(stream.source.state_dict(), lambda tensor: tensor)
            leads_back = state_leads_back(stream)
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
    return {**found, "leads_back": leads_back, "refused": refused}


def _conclude(
    parts: Parts, split: str, loader: Any, results: list[dict[str, Any]], stream: TrainStream | None
) -> None:
    is_main, kind = parts.ranks.is_main_process, _name_of(loader)
    varies = any(found["varies"] for found in results)
    # a training loader of the user's own is each rank's
    is_shared = is_common(loader) and (stream is None or isinstance(loader, PassLoader))
    differs = varies or len({found["content"] for found in results}) > 1
    if is_shared and differs and len(results) > 1:
        raise ConfigError(
            f"split {split!r}: the {kind} gives other samples on each rank, or each time that it is read, and each "
            "rank keeps its part of what should be the same, so that some would be lost and others doubled: "
            f"{_SEED_IT}, or let it split itself over the ranks and set its attribute `sharded` to true"
        )
    if stream is None:
        return
    by_state = stream.source is not None and all(found["leads_back"] for found in results)
    facts = {"content": results[0]["content"], "varies": varies and not by_state}  # rank 0 saves them
    parts.splits.take_trial(split, facts, goes_by_state=by_state)
    if not is_main:
        return
    if varies:
        logger.warning(
            "split %r: the %s gives other samples each time that it is read, so that a resume will not have the bits "
            "of a run that was never interrupted: %s",
            *(split, kind, _SEED_IT),
        )
    elif by_state:
        return
    elif stream.source is not None:
        why = next((found["refused"] for found in results if found["refused"]), None)
        logger.info(
            "split %r: %s, so a resume inside an epoch is exact by reading up to its position again",
            split,
            why
            or f"the state of the {kind} does not lead back to the same batches (a shuffle buffer, random numbers)",
        )
    else:
        logger.info(
            "split %r: the %s has no state_dict, so a resume inside an epoch reads up to its position again",
            *(split, kind),
        )


def _name_of(loader: Any) -> str:
    data = getattr(loader, "dataset", loader)
    return type(getattr(data, "dataset", data)).__name__

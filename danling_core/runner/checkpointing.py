"""What a checkpoint of a runner holds, and how it is taken up again, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from danling_core.checkpoints.codec import load_state
from danling_core.checkpoints.ledger import all_damaged
from danling_core.checkpoints.store import CheckpointStore
from danling_core.errors import CheckpointCorrupt, CheckpointError, DanLingError, NonFiniteLossError
from danling_core.metrics import states as metric_states
from danling_core.parallel import distributed, seeding
from danling_core.runner.loop import flush_losses

if TYPE_CHECKING:
    from danling_core.checkpoints.record import Record
    from danling_core.runner.torch_runner import TorchRunner
    from danling_core.runner.torch_setup import TorchSetUp
    from danling_core.session.files import RunFiles

VERSION = 1


# saving -----------------------------------------------------------------------------------------------------
def shared_state(runner: TorchRunner) -> dict[str, Any]:
    """State that is equal on all ranks; tensors are the live ones."""
    return {
        "version": VERSION,
        "model": runner.unwrap(runner.model).state_dict(),
        "ema": runner.ema.module.state_dict() if runner.ema is not None else None,
        "criterion": _state_of(runner.criterion),
        "optimizer": runner.optimizer.state_dict() if runner.optimizer is not None else None,
        "scheduler": runner.scheduler.state_dict() if runner.scheduler is not None else None,
        "scaler": runner._precision.scaler.state_dict() if runner._precision.scaler is not None else None,
        "progress": runner._progress.state_dict(),
        "results": runner._results.state_dict(),
        "done_splits": dict(runner._done_splits),
        "epoch_is_over": runner._epoch_is_over,
        "streams": {split: stream.state_dict() for split, stream in runner._streams.items()},
        "config": runner.config.canonical(),
        "device": runner.device.type,
        "world_size": runner.world_size,
    }


def _state_of(criterion: Any) -> dict[str, Any] | None:
    return criterion.state_dict() if isinstance(criterion, nn.Module) else None


def rank_state(runner: TorchRunner) -> dict[str, Any]:
    """State that differs between ranks. The generators are as they were before an evaluation that is going
    on."""
    state: dict[str, Any] = {"rng": runner._rng_before_evaluation or seeding.capture_rng()}
    if runner._inside_split:
        metrics = runner._metrics_in_use()
        state["split"] = {
            "name": runner.split,
            "meter": runner.meters.state_dict(),
            "metrics": metric_states.saved(metrics) if metrics is not None else None,
            "iters_at_split": runner._iters_at_split,
            "steps_at_split": runner._steps_at_split,
        }
    if runner.distributed and not runner.config.broadcast_buffers:
        state["buffers"] = {n: b.cpu().clone() for n, b in runner.unwrap(runner.model).named_buffers()}
    if runner.distributed and isinstance(runner.criterion, nn.Module):  # DDP does not know it
        state["criterion"] = {n: b.cpu().clone() for n, b in runner.criterion.named_buffers()}
    return state


def save(
    runner: TorchRunner, name: str, epochs: int | None, save_best: bool, *, required: bool = False
) -> None:
    """See `TorchRunner.save_checkpoint`; a `required` save is never given up for a newer one. Collective."""
    if runner.meters is not None:  # nothing was trained yet
        flush_losses(runner)
    ranks = distributed.gather_objects(rank_state(runner))
    files = runner._files
    if files is None:
        return
    files.saver.check()
    every = runner.save_interval
    names = [name]
    # else the state is past the latest result
    is_scored = not runner._inside_split and not runner._done_splits
    if save_best and runner.is_best and is_scored:
        names.append("best")
    if epochs is not None and every is not None and (epochs + 1) % every == 0:
        names.append(f"epoch-{epochs}")
    files.saver.save(
        {**runner.state_dict(), "ranks": ranks},
        step=runner.steps,
        attempt=files.context.attempt,
        info={**_info(runner), "run_id": files.status.run_id, "timestamp": files.status.timestamp},
        names=names,
        required=required or len(names) > 1 or runner._progress.finished,
        inspect=_weights_check(runner) if runner.config.non_finite == "raise" else None,
    )


def _weights_check(runner: TorchRunner) -> Callable[[Mapping[str, Any]], None]:
    """Looks at the trained weights of a snapshot, in the background: the loop would wait for it as for the copy.

    A finite loss may have a gradient that is not, and a resume from such weights could only fail. What it
    returns raises NonFiniteLossError.
    """
    parts = {"model": runner.unwrap(runner.model), "criterion": runner.criterion}
    modules = {part: module for part, module in parts.items() if isinstance(module, nn.Module)}
    trained = [(part, n) for part, m in modules.items() for n, p in m.named_parameters() if p.requires_grad]
    step = runner.steps

    def check(state: Mapping[str, Any]) -> None:
        for part, name in trained:
            weight = (state.get(part) or {}).get(name)
            if weight is not None and not _is_finite(weight):
                raise NonFiniteLossError(
                    f"weight {name!r} of the {part} is not finite after step {step}, though no loss was: a gradient "
                    "was not. Nothing is saved, and a resume begins with the checkpoint before; lower the learning "
                    "rate, clip gradients, or set non_finite=skip"
                )

    return check


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.numel():
        return True
    values = torch.view_as_real(weight) if weight.is_complex() else weight
    return all(math.isfinite(end.item()) for end in torch.aminmax(values))


def _info(runner: TorchRunner) -> dict[str, Any]:
    return {
        "progress": {"iters": runner.iters, "steps": runner.steps, "epochs": runner.epochs},
        "epochs": runner.epochs,
        "score": runner.latest_score,
        "best_index": runner.best_index,
        "inside": runner.split if runner._inside_split else None,
        "world_size": runner.world_size,
    }


# resuming ---------------------------------------------------------------------------------------------------
def resume(runner: TorchSetUp) -> dict[str, Any] | None:
    """Take up the newest good checkpoint of this run, if there is one. Collective. Returns where it stands.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
        ConfigError: the checkpoints are another run's.
    """
    record = _agree(runner, _newest_good)
    if record is None:
        return None
    apply(runner, load_state(_store(runner), record, map_location="cpu"))
    return {"step": runner.steps, "epoch": runner.epochs, "record": record.name}


def _agree(runner: TorchSetUp, choose: Callable[[TorchSetUp, RunFiles], Record | None]) -> Record | None:
    """What rank 0 chooses, or raises, on every rank. Collective."""
    chosen: Record | DanLingError | None = None
    if runner._files is not None:
        try:
            chosen = choose(runner, runner._files)
        except DanLingError as error:
            chosen = error
    record: Record | DanLingError | None = distributed.broadcast_object(chosen)
    if isinstance(record, DanLingError):
        raise record
    return record


def _store(runner: TorchSetUp) -> CheckpointStore:
    return (
        runner._files.store if runner._files is not None else CheckpointStore(runner._local_checkpoint_dir())
    )


def _newest_good(runner: TorchSetUp, files: RunFiles) -> Record | None:
    files.check_store()
    store = files.store
    record, bad = store.newest_good()
    for each in bad:
        runner.logger.warning(
            "checkpoint %s is bad (%s): going back to the one before", each.name, each.reason
        )
    if record is not None or not bad:
        return record
    raise all_damaged(store.url, bad)


def apply(runner: TorchSetUp, state: Mapping[str, Any]) -> None:
    """Put a whole state into a runner that is set up. The order matters: generators come last, after the
    streams."""
    runner.load_state_dict(state)
    _apply_rank(runner, state)


def apply_shared(runner: TorchSetUp, state: Mapping[str, Any]) -> None:
    """Take over what `shared_state` gave."""
    _apply_weights(runner, state)
    if isinstance(runner.criterion, nn.Module) and state.get("criterion"):
        runner.criterion.load_state_dict(state["criterion"])
    if runner.optimizer is not None and state["optimizer"] is not None:
        runner.optimizer.load_state_dict(state["optimizer"])
    if runner.scheduler is not None and state["scheduler"] is not None:
        runner.scheduler.load_state_dict(state["scheduler"])
    if runner._precision.scaler is not None and state["scaler"]:
        runner._precision.scaler.load_state_dict(state["scaler"])
    runner._progress.load_state_dict(state["progress"])
    runner._results.load_state_dict(state["results"])
    runner._done_splits = dict(state["done_splits"])
    runner._epoch_is_over = state["epoch_is_over"]
    for split, position in state["streams"].items():
        if split in runner._streams:
            runner._streams[split].load_state_dict(position)


def _apply_weights(runner: TorchSetUp, state: Mapping[str, Any]) -> None:
    """The model's, and the averaged ones: a state without those starts the average from its model."""
    if state.get("version", VERSION) > VERSION:
        raise CheckpointError(
            f"the checkpoint has version {state['version']}, this danling reads up to {VERSION}: update danling"
        )
    runner.unwrap(runner.model).load_state_dict(state["model"])
    if runner.ema is not None:
        averaged = state.get("ema")
        runner.ema.module.load_state_dict(state["model"] if averaged is None else averaged)


def _apply_rank(runner: TorchSetUp, state: Mapping[str, Any]) -> None:
    ranks = state["ranks"]
    device = state.get("device", runner.device.type)
    if device != runner.device.type:
        runner._resumed_bitwise = False
        runner.logger.warning(
            "the run was on %s and goes on with %s: it will not be bitwise equal", device, runner.device.type
        )
    if len(ranks) == runner.world_size:
        mine = ranks[runner.rank]
        runner._split_state = mine.get("split")
        _apply_buffers(runner.unwrap(runner.model), mine.get("buffers", {}))
        _apply_buffers(runner.criterion, mine.get("criterion", {}))
        seeding.restore_rng(mine["rng"])
        return
    runner._resumed_bitwise = False
    runner.logger.warning(
        "the run was on %d rank(s) and goes on with %d: it will not be bitwise equal",
        len(ranks),
        runner.world_size,
    )
    runner._split_state = _merged_split(runner, [rank["split"] for rank in ranks if rank.get("split")])
    runner.set_seed(runner.seed + 1_000_003 * (runner.steps + 1))


def _apply_buffers(module: Any, saved: Mapping[str, Any]) -> None:
    """This rank's own, where ranks keep their own."""
    for name, buffer in module.named_buffers() if saved else ():
        if name in saved:
            buffer.copy_(saved[name])


def _merged_split(runner: TorchSetUp, states: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What all former ranks had counted, on rank 0; nothing on the others."""
    if not states:
        return None
    is_first, counted = runner.rank == 0, None
    metrics = runner.metrics if runner.train_metrics is None else runner.train_metrics
    if metrics is not None and all(state["metrics"] is not None for state in states):
        counted = metric_states.merged(metrics, [state["metrics"] for state in states], is_first=is_first)
    meters = [state["meter"] for state in states]
    share = 1 if is_first else 0
    return {
        "name": states[0]["name"],
        "iters_at_split": states[0]["iters_at_split"],
        "steps_at_split": states[0].get("steps_at_split", 0),
        "meter": {
            "total": share * sum(meter["total"] for meter in meters),
            "count": share * sum(meter["count"] for meter in meters),
            "iters": meters[0]["iters"],
        },
        "metrics": counted,
    }


def restore_split(runner: TorchRunner, state: Mapping[str, Any]) -> None:
    """Losses and metrics of the split that was being trained."""
    if state["name"] != runner.split:
        return
    runner.meters.load_state_dict(state["meter"])
    runner._iters_at_split = state["iters_at_split"]
    runner._steps_at_split = state.get("steps_at_split", 0)
    metrics = runner._metrics_in_use()
    if metrics is not None:
        metric_states.restore(metrics, state["metrics"], runner.device)


def save_interrupted(runner: TorchRunner) -> None:
    """Save where the run stands inside an epoch, and wait until that is committed. Collective."""
    save(runner, "latest", None, save_best=False, required=True)
    if runner._files is not None:
        runner._files.saver.drain()


def load_best(runner: TorchRunner) -> Record | None:
    """Weights (averaged ones too) of the best checkpoint, else the newest good one, on every rank. Collective."""
    if runner._files is not None:
        runner._files.saver.drain()
    record = _agree(runner, _best)
    if record is not None:
        _apply_weights(runner, load_state(_store(runner), record, map_location="cpu"))
    return record


def _best(runner: TorchSetUp, files: RunFiles) -> Record | None:
    try:
        best = files.store.pointed("best")
        if best is not None:
            files.store.open(best)  # verifies it
            return best
    except CheckpointCorrupt as error:
        runner.logger.warning("the best checkpoint is bad (%s): the newest good one takes its place", error)
    return _newest_good(runner, files)

"""Call a run's flow beside the run: training never waits for an orchestrator that is slow to show it."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from prefect.client.schemas.objects import State

from danling_core.errors import LaunchError
from flows.outcome import RunOutcome
from flows.view import LateView

logger = logging.getLogger("danling.flows")

_MOST_OPEN = 64
"""Flow runs of a flow that the orchestrator is behind with, and whose threads wait for it."""

_current: ContextVar[FlowCall | None] = ContextVar("danling_flow_call", default=None)


class FlowCall:
    """A call of a run's flow in a thread of its own.

    The run is trained by whoever takes it first: the flow's body, or the caller, when that has not come in time. A
    body that comes late shows what the caller trains.

    Args:
        call: calls the flow; returns the state in which it ended.
    """

    def __init__(self, call: Callable[[], State[Any]]) -> None:
        self.late_view = LateView()
        self.state: State[Any] | None = None
        self.error: Exception | None = None
        self._call = call
        self._outcome: RunOutcome | None = None
        self._is_taken = False
        self._has_returned = False
        self._changed = threading.Condition()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="danling-run", daemon=True
        )

    def start(self) -> None:
        """Call the flow; returns at once."""
        self._thread.start()

    def give_up(self, reason: str) -> None:
        """Leave the flow uncalled."""
        with self._changed:
            self.error, self._has_returned = LaunchError(reason), True

    def take(self) -> bool:
        """Return whether the caller of this method is the one to train the run: true once."""
        with self._changed:
            is_first, self._is_taken = not self._is_taken, True
            self._changed.notify_all()
            return is_first

    def end(self, outcome: RunOutcome) -> RunOutcome:
        """Take note of how the run has ended; return it."""
        with self._changed:
            self._outcome = outcome
            self._changed.notify_all()
        self.late_view.end()
        return outcome

    def outcome(self) -> RunOutcome:
        """Wait for `end`, and return how the run has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._outcome is not None)
            assert self._outcome is not None
            return self._outcome

    def wait_until_taken(self, timeout_seconds: float) -> None:
        """Return when the flow's body has taken the run, when the flow has returned without, or at the time-out."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_taken or self._has_returned, timeout_seconds)

    def wait_until_ended(self) -> RunOutcome | None:
        """Return how the run has ended; None where the flow has returned without an end."""
        with self._changed:
            self._changed.wait_for(lambda: self._outcome is not None or self._has_returned)
            return self._outcome

    def why_no_end(self) -> str:
        """Return what Prefect says of a flow that has returned without an end of the run."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}"
        return "no reason given" if self.state is None else str(self.state.message)

    @property
    def has_returned(self) -> bool:
        """Return whether the flow run has ended in the orchestrator, too."""
        return self._has_returned

    def join(self, timeout_seconds: float) -> None:
        """Wait for the flow run's end in the orchestrator."""
        self._thread.join(max(0.0, timeout_seconds))

    def _work(self) -> None:
        _current.set(self)
        try:
            self.state = self._call()
        except Exception as error:
            self.error = error
        finally:
            with self._changed:
                self._has_returned = True
                self._changed.notify_all()


class FlowCalls:
    """The calls of the flows of many runs."""

    def __init__(self) -> None:
        self._open: list[FlowCall] = []
        self._lock = threading.Lock()

    def begin(self, call: Callable[[], State[Any]]) -> FlowCall:
        """Call a flow; see `FlowCall`. Where too many have not ended in the orchestrator, this one is not called."""
        flow = FlowCall(call)
        with self._lock:
            self._open = [each for each in self._open if not each.has_returned]
            is_behind = len(self._open) >= _MOST_OPEN
            if not is_behind:
                self._open.append(flow)
        if is_behind:
            flow.give_up(f"{_MOST_OPEN} flow runs before it wait for the API")
        else:
            flow.start()
        return flow

    def join(self, timeout_seconds: float) -> None:
        """Wait for the ends of the flow runs in the orchestrator; say which is not seen to end."""
        end = time.monotonic() + timeout_seconds
        for flow in self._open:
            flow.join(end - time.monotonic())
        left = sum(not flow.has_returned for flow in self._open)
        if left:
            logger.warning(
                "the API has not taken note of the end of %d flow runs: `danling doctor` tells it", left
            )


def flow_call() -> FlowCall | None:
    """Return the call that the flow at work is the body of; None where it is called in its caller's thread."""
    return _current.get()

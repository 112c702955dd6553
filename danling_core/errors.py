"""Every exception that danling raises on purpose, in one tree."""

from __future__ import annotations


class DanLingError(Exception):
    """Base of all errors raised on purpose: catch this one to catch them all."""


class ConfigError(DanLingError, ValueError):
    """Invalid input, refused before anything starts; `danling` exits with 2."""


class ScoreError(ConfigError):
    """The metric named by `score_name` is not among those that a split reports."""


class StorageError(DanLingError):
    """A store refused or failed. The message names the operation, the URL and what to do."""


class NotFound(StorageError):
    """There is nothing at this URL."""


class AccessDenied(StorageError):
    """The store answered, and refuses this identity: no retry can help."""


class StoreUnavailable(StorageError):
    """The store did not answer, or kept failing, until the deadline: a later retry may help."""


class CheckpointError(DanLingError):
    """A checkpoint cannot be written or read."""


class CheckpointCorrupt(CheckpointError):
    """The bytes of a checkpoint are not those that were committed."""


class LeaseError(DanLingError):
    """The right to write into a run folder."""


class RunBusy(LeaseError):
    """Another living process owns this run; the message says which, and since when."""


class Fenced(LeaseError):
    """This process owned the run once, and another has taken it over since: stop before writing."""


class CodeChanged(DanLingError):
    """The code is no longer the one that a run was prepared with: what it trained would bear the wrong id."""


class CallbackError(DanLingError):
    """A callback raised: the message says which one, at which moment, and what."""


class DataError(DanLingError):
    """The data is not what it said: a batch without a size, or an end before its length."""


class NonFiniteLossError(DanLingError, ArithmeticError):
    """The loss became NaN or infinite and the policy is to raise. Names step, rank and value."""


class RanksDiffer(DanLingError):
    """The ranks hold different weights: a gradient was not reduced. What they trained is no one model."""


class LaunchError(DanLingError):
    """The launcher process could not be started, or it died."""


class RunFailed(DanLingError):
    """A run ended by a failure in a rank.

    Args:
        message: the first failure in one line.
        traceback: the first failing rank's traceback, as text.
        rank: the first failing rank, where known.
    """

    def __init__(self, message: str, traceback: str | None = None, rank: int | None = None) -> None:
        super().__init__(message)
        self.traceback = traceback
        self.rank = rank

    def __reduce__(self) -> tuple[type, tuple[str, str | None, int | None]]:
        return type(self), (str(self), self.traceback, self.rank)


class RunInterrupted(DanLingError):
    """A run was asked to stop; it saved what it had and can be resumed. `danling` exits 75."""

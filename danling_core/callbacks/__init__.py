"""Callbacks: a user's own code at the moments of a training."""

from danling_core.callbacks.callback import Callback
from danling_core.callbacks.callbacks import Callbacks, check_callback

__all__ = ["Callback", "Callbacks", "check_callback"]

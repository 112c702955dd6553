"""The names under which secrets are kept: of variables, of options, and of hyperparameters."""

from __future__ import annotations

import re

_ENDING = re.compile(
    r"(passw(or)?d|passphrase|secrets?"
    r"|(^|[-_.])(pass|pwd|token|credentials?|auth([-_](string|config|header|key))?|authorization|cookie|signature"
    r"|(api|access|secret|private|account|master|encryption)[-_]?key([-_]id)?|apikey|connection[-_]string|sas))$",
    re.IGNORECASE,
)
_HYPERPARAMETERS = {
    "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials",
    "connection_string", "secret_key", "secret_access_key", "client_secret", "private_key", "api_key", "apikey",
    "api_secret", "account_key", "access_key", "access_key_id", "aws_access_key_id", "aws_secret_access_key",
    "wandb_api_key", "token", "api_token", "access_token", "auth_token", "bearer_token", "refresh_token",
    "session_token", "aws_session_token", "sas_token", "hf_token", "github_token",
}  # fmt: skip


def looks_secret(name: str) -> bool:
    """Whether a variable, or an option on a command line, of this name is likely to hold a secret."""
    return bool(_ENDING.search(name))


def is_secret_name(key: str) -> bool:
    """Whether a hyperparameter of exactly this name holds a secret. `max_tokens` and `pad_token` do not."""
    return _snake(key) in _HYPERPARAMETERS


def is_secret_option(key: str) -> bool:
    """Whether an option of a store's client may hold a secret: also everything that ends in `key` or `token`."""
    name = _snake(key)
    return name.endswith(("key", "token")) or looks_secret(name)


def _snake(key: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return spaced.replace("-", "_").replace(" ", "_").lower()

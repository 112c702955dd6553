"""Takes secrets out of text before it is written, logged or raised."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

from .secret_names import looks_secret

_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s:@]*:)?(?P<password>[^/\s@]+)@")
_QUERY_SECRET = re.compile(
    r"(?P<name>[?&;]?\b[\w.-]*(?:token|signature|secret|password|credential|api_?key|sig)=)[^&\s\"']+",
    re.IGNORECASE,
)
_MASK = "***"
_SHORTEST_SECRET = 8


def environment_secrets() -> list[str]:
    """What the environment holds under secret-looking names, and passwords in its URLs; longest first."""
    values = {value for name, value in os.environ.items() if looks_secret(name)}
    values |= {match["password"] for value in os.environ.values() for match in _USER_INFO.finditer(value)}
    return sorted(filter(_worth_hiding, values), key=len, reverse=True)


def _worth_hiding(value: str) -> bool:
    is_number = value.replace(".", "", 1).isdigit()
    return len(value) >= _SHORTEST_SECRET and not is_number and not os.path.exists(value)


def redact(text: str, secrets: Iterable[str] | None = None) -> str:
    """`text` without passwords in URLs, without secret query values, and without any of `secrets`.

    Args:
        text: what is about to be shown or stored.
        secrets: exact strings to hide; by default the secret-looking values of the environment.
    """
    for secret in environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, _MASK)
    text = _USER_INFO.sub(rf"\g<scheme>{_MASK}@", text)
    return _QUERY_SECRET.sub(rf"\g<name>{_MASK}", text)


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line in which the values of secret-looking options are masked.

    `--password x`, `--password=x`, `params.api_key=x` and `https://user:x@host` all lose their `x`.
    """
    shown: list[str] = []
    is_value_of_secret = False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        if is_value_of_secret and not argument.startswith("-"):
            shown.append(_MASK)
            is_value_of_secret = False
            continue
        is_secret = looks_secret(name.lstrip("-")) and (bool(separator) or argument.startswith("-"))
        is_value_of_secret = is_secret and not separator
        shown.append(f"{name}={_MASK}" if is_secret and separator else redact(argument))
    return shown

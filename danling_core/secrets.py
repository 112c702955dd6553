"""Secrets: the names they go by, their refusal in configs, and their removal from text that is shown or stored."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

# names ----------------------------------------------------------------------------------------------------
_ENDING = re.compile(
    r"(passw(or)?d|passphrase|secrets?|webhook([-_]url)?"
    r"|(^|[-_.])(pass|pwd|pat|jwt|dsn|bearer|token|credentials?|auth([-_](string|config|header|key))?|authorization|cookie|signature"
    r"|((api|access|secret|private|account|master|encryption)[-_]?)?key([-_]id)?|apikey|connection[-_]string|sas))$",
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
    """Return whether a variable, or an option on a command line, of this name is likely to hold a secret."""
    return bool(_ENDING.search(name))


def is_secret_name(key: str) -> bool:
    """Return whether a hyperparameter of exactly this name holds a secret. `max_tokens` and `pad_token` do not."""
    return _snake(key) in _HYPERPARAMETERS


def is_secret_option(key: str) -> bool:
    """Return whether an option of a store's client may hold a secret: also everything that ends in `key` or `token`."""
    name = _snake(key)
    return name.endswith(("key", "token")) or looks_secret(name)


def _snake(key: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return spaced.replace("-", "_").replace(" ", "_").lower()


# refusal in configs ---------------------------------------------------------------------------------------
# gcsfs: ways to log in
_PUBLIC_OPTION_VALUES = frozenset({"anon", "google_default", "cache", "cloud", "browser"})
_USERINFO = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<userinfo>[^/?#\s@]*)@", re.IGNORECASE)
_USER_IS_AN_ADDRESS = frozenset({"abfs", "abfss", "wasb", "wasbs", "sftp", "ssh"})
_SIGNATURE = re.compile(
    r"://\S*[?&](?:sig|signature|x-amz-signature|x-amz-security-token|x-goog-signature|token|access_token"
    r"|password|secret)=",
    re.IGNORECASE,
)
_WAY_OUT = (
    "a config is written to disk and shown: give secrets through the environment or the store's own login"
)


def url_secret(text: str) -> str | None:
    """Return what makes a URL secret ("user:password@", "a signature"), or None."""
    for match in _USERINFO.finditer(text):
        if ":" in match["userinfo"] or match["scheme"].lower() not in _USER_IS_AN_ADDRESS:
            return "user:password@"
    return "a signature or token" if _SIGNATURE.search(text) else None


def refuse_in_url(url: str) -> str:
    """Return the URL itself; ValueError (which does not repeat it) when it carries a secret."""
    found = url_secret(url)
    if found is not None:
        raise ValueError(f"wanted a URL without secrets, found {found} in it; {_WAY_OUT}")
    return url


def refuse_in_values(values: Mapping[str, Any]) -> None:
    """ValueError naming the key when values hold a secret by its usual name, or a URL with a password."""
    for path, key, value in _leaves(values):
        if isinstance(value, str) and value and is_secret_name(key):
            raise ValueError(f"{path!r} looks like a secret; {_WAY_OUT}")
        if isinstance(value, str) and any(":" in match["userinfo"] for match in _USERINFO.finditer(value)):
            raise ValueError(f"{path!r} holds a URL with user:password@; {_WAY_OUT}")


def refuse_in_options(options: Mapping[str, Any]) -> None:
    """Return the stricter rule for storage options: any key that may hold a secret, whatever its value."""
    for path, key, value in _leaves(options):
        if is_secret_option(key) and value not in (None, False) and value not in _PUBLIC_OPTION_VALUES:
            raise ValueError(f"{path!r} looks like a secret; {_WAY_OUT}")
        if isinstance(value, str) and url_secret(value):
            raise ValueError(f"{path!r} holds a URL with {url_secret(value)}; {_WAY_OUT}")


def shown(value: Any, path: Sequence[object] = ()) -> str:
    """Return a short repr of what was found at `path`, for an error message; "(hidden)" where it may be a secret."""
    names = [str(part) for part in path]
    if any(is_secret_option(name) for name in names):
        return "(hidden)"
    if isinstance(value, (Mapping, list, tuple, set)):
        return f"a {type(value).__name__}"  # its parts may be secret
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if url_secret(text):
        return "(hidden)"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _leaves(value: Any, path: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{path}.{name}" if path else str(name), str(name))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]", "" if isinstance(item, str) else key)
    else:
        yield path, key, value


# removal from text ----------------------------------------------------------------------------------------
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s:@]*:)?(?P<password>[^/\s@]+)@")
_QUERY_SECRET = re.compile(
    r"(?P<name>[?&;]?\b[\w.-]*(?:token|signature|secret|password|credential|api_?key|sig)=)[^&\s\"']+",
    re.IGNORECASE,
)
_MASK = "***"
_SHORTEST_SECRET = 5
_UNMISTAKABLE_LENGTH = 8


def environment_secrets() -> list[str]:
    """Return the environment's values under secret-looking names, and passwords in its URLs; longest first."""
    values = {value for name, value in os.environ.items() if looks_secret(name)}
    values |= {match["password"] for value in os.environ.values() for match in _USER_INFO.finditer(value)}
    return sorted(filter(_worth_hiding, values), key=len, reverse=True)


def _worth_hiding(value: str) -> bool:
    return len(value) >= _SHORTEST_SECRET and not os.path.exists(value)


def _forms(secret: str) -> set[str]:
    """Return a secret as it is, and as `repr`, JSON and a URL would have it."""
    return {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe=""), quote_plus(secret)}


def _without(text: str, secret: str) -> str:
    """Return text without a secret. One that is short, or a number, is only hidden where it stands by itself."""
    for form in sorted(_forms(secret), key=len, reverse=True):
        if len(form) >= _UNMISTAKABLE_LENGTH and not form.isdigit():
            text = text.replace(form, _MASK)
        elif form in text:
            text = re.sub(rf"(?<![\w.]){re.escape(form)}(?![\w]|\.\d)", _MASK, text)
    return text


def redact(text: str, secrets: Iterable[str] | None = None) -> str:
    """Return `text` without passwords in URLs, without secret query values, and without any of `secrets`.

    Args:
        text: what is about to be shown or stored.
        secrets: exact strings to hide; by default the secret-looking values of the environment.
    """
    for secret in environment_secrets() if secrets is None else secrets:
        text = _without(text, secret)
    text = _USER_INFO.sub(rf"\g<scheme>{_MASK}@", text)
    return _QUERY_SECRET.sub(rf"\g<name>{_MASK}", text)


def redact_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which the values of secret-looking options are masked.

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

"""Keeps secrets out of configs: which keys and URLs may hold one, and what to say then."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from danling_core.secret_names import is_secret_name, is_secret_option

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
    """What makes a URL secret ("user:password@", "a signature"), or None when nothing does."""
    for match in _USERINFO.finditer(text):
        if ":" in match["userinfo"] or match["scheme"].lower() not in _USER_IS_AN_ADDRESS:
            return "user:password@"
    return "a signature or token" if _SIGNATURE.search(text) else None


def refuse_in_url(url: str) -> str:
    """The URL itself; ValueError (which does not repeat it) when it carries a secret."""
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
    """The stricter rule for storage options: any key that may hold a secret, whatever its value."""
    for path, key, value in _leaves(options):
        if is_secret_option(key) and value not in (None, False) and value not in _PUBLIC_OPTION_VALUES:
            raise ValueError(f"{path!r} looks like a secret; {_WAY_OUT}")
        if isinstance(value, str) and url_secret(value):
            raise ValueError(f"{path!r} holds a URL with {url_secret(value)}; {_WAY_OUT}")


def shown(value: Any, path: Sequence[object] = ()) -> str:
    """A short repr of what was found at `path`, for an error message; "(hidden)" where it may be a secret."""
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

"""Turns what operating systems and clients of stores raise into our own errors."""

from __future__ import annotations

import asyncio
import errno
import os

from danling_core.errors import AccessDenied, DanLingError, NotFound, StorageError, StoreUnavailable
from danling_core.secrets import redact

_PASSING_ERRNOS = {
    errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE,
    errno.EPIPE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTUNREACH, errno.EHOSTDOWN,
    errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED,
}  # fmt: skip
_PASSING_CLASSES = {
    # by name, so that no client library is imported to recognise its errors
    ("botocore", "HTTPClientError"),
    ("botocore", "ConnectionError"),
    ("botocore", "IncompleteReadError"),
    ("botocore", "ResponseStreamingError"),
    ("botocore", "ResponseParserError"),
    ("aiobotocore", "AioConnectionClosedError"),
    ("aiohttp", "ClientError"),
    ("http", "IncompleteRead"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
    ("requests", "ChunkedEncodingError"),
    ("requests", "ContentDecodingError"),
    ("google", "TransportError"),
    ("gcsfs", "ChecksumError"),
}
_IDENTITY_CLASSES = {
    ("botocore", "NoCredentialsError"),
    ("botocore", "PartialCredentialsError"),
    ("botocore", "CredentialRetrievalError"),
    ("botocore", "ProfileNotFound"),
    ("botocore", "TokenRetrievalError"),
    ("botocore", "UnauthorizedSSOTokenError"),
    ("google", "DefaultCredentialsError"),
    ("google", "RefreshError"),
}
_PASSING_CODES = {
    "NoSuchUpload", "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted",
    "ConditionalRequestConflict", "Throttling", "ThrottlingException", "TooManyRequests",
    "RequestLimitExceeded", "BadDigest", "IncompleteBody",
    "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
    "408", "409", "429", "500", "502", "503", "504",
}  # fmt: skip
_REFUSED_CODES = {"401", "403", "AccessDenied", "Forbidden", "Unauthorized"}


class Passing(Exception):
    """Raised inside an operation for a wrong answer that a repetition is likely to put right."""


def error_code(error: BaseException) -> str:
    """Return the store's own code for the error (`"NoSuchBucket"`, `"503"`), from it or its cause; else `""`."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
        code = getattr(seen, "code", None)
        if isinstance(code, int | str) and not isinstance(seen, OSError):
            return str(code)
        seen = seen.__cause__
    return ""


def already_exists(error: BaseException) -> bool:
    """Return whether the error is how a conditional create says that there is an object already."""
    if isinstance(error, FileExistsError) or error_code(error) in ("PreconditionFailed", "412"):
        return True
    return isinstance(error, OSError) and error.errno == errno.EINVAL and "condition" in str(error).lower()


def translate(error: BaseException, operation: str, url: str, identity: str = "") -> DanLingError:
    """Our error for a failed `operation` on `url`; `StoreUnavailable` means that a retry may help.

    Args:
        error: what was raised.
        operation: a verb, for the message.
        url: what was operated upon; anything secret in it is masked.
        identity: who asked and where, for the message of a refusal.
    """
    if isinstance(error, DanLingError):
        return error
    where = f"cannot {operation} {redact(url)!r}"
    detail = redact(f"{type(error).__name__}: {error}".strip().rstrip(":"))[:500]
    code = error_code(error)
    if _is_passing(error, code):
        return StoreUnavailable(f"{where}: {detail}")
    if isinstance(error, FileNotFoundError):
        return NotFound(_not_found(where, operation, code, detail))
    if _is_refusal(error, code):
        asked = f" ({redact(identity)})" if identity else ""
        return AccessDenied(
            f"{where}: the store refuses{asked}: {detail}. Check the credentials and their permissions"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{where}: no space is left: {os.strerror(error.errno)}")
    return StorageError(f"{where}: {detail}")


def _not_found(where: str, operation: str, code: str, detail: str) -> str:
    if code == "NoSuchBucket" or operation in ("write", "create", "put"):
        return f"{where}: there is no such bucket or folder; create it first, or correct the URL ({detail})"
    return f"{where}: there is nothing there"


def _is_passing(error: BaseException, code: str) -> bool:
    if isinstance(error, Passing | TimeoutError | asyncio.TimeoutError | ConnectionError | BlockingIOError):
        return True
    if code in _PASSING_CODES or _is_one_of(error, _PASSING_CLASSES):
        return not isinstance(error, PermissionError)
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNOS


def _is_refusal(error: BaseException, code: str) -> bool:
    if isinstance(error, PermissionError) or code in _REFUSED_CODES or _is_one_of(error, _IDENTITY_CLASSES):
        return True
    return isinstance(error, OSError) and error.errno is None and str(error).startswith("Forbidden")


def _is_one_of(error: BaseException, classes: set[tuple[str, str]]) -> bool:
    return any((kind.__module__.partition(".")[0], kind.__name__) in classes for kind in type(error).__mro__)

"""The types of a config's fields: numbers that are no booleans, names for folders, URLs without secrets."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator

from danling_core.config.documents import plain
from danling_core.secrets import refuse_in_options, refuse_in_url, refuse_in_values, shown

Values: TypeAlias = dict[str, Any]

_NAME = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|\[\]]+")
_EXPERIMENT_ID = re.compile(r"[0-9A-Za-z._-]{8,100}")
_RUNNER = re.compile(r".*[^:]:[^:\s/]+")
_STORAGE_BLOCK = re.compile(r"(aws|minio|gcp)-credentials/[^/\s]+")


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"wanted a number, found {str(value).lower()}")
    return value


def _safe_name(text: str) -> str:
    if not _NAME.fullmatch(text) or text != text.strip() or text.startswith(".") or len(text.encode()) > 100:
        raise ValueError(
            "wanted a name fit for a folder (1 to 100 bytes, no leading dot, no outer space, none of "
            f'/ \\ : * ? " < > | [ ]), found {shown(text)}'
        )
    return text


def _experiment_id(text: str) -> str:
    if not _EXPERIMENT_ID.fullmatch(text):
        raise ValueError(
            f"wanted 8 or more letters, digits, '.', '_' or '-' (a git commit), found {shown(text)}"
        )
    return text


def _runner(text: str) -> str:
    if not _RUNNER.fullmatch(refuse_in_url(text)):
        raise ValueError(f"wanted 'package.module:Class' or 'path/to/file.py:Class', found {shown(text)}")
    return text


def _storage_block(text: str) -> str:
    if not _STORAGE_BLOCK.fullmatch(text):
        raise ValueError(
            "wanted type and name of a Prefect block: 'aws-credentials/NAME', 'minio-credentials/NAME' or "
            f"'gcp-credentials/NAME', found {shown(text)}"
        )
    return text


def _local(path: str) -> str:
    if "://" in refuse_in_url(path):
        raise ValueError("wanted a local folder, found a URL")
    return path


def _free(values: Values) -> Values:
    found: Values = plain(values)
    refuse_in_values(found)
    return found


def _options(values: Values) -> Values:
    found: Values = plain(values)
    refuse_in_options(found)
    return found


def _count_or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValueError:
        raise ValueError(f"wanted a number >= 1 or 'auto', found {shown(value)}") from None


def _part(value: Any) -> int | float:
    """Return a number of batches (a whole number >= 1), or a fraction of them (a number with a point, at most 1.0)."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_count and not (isinstance(value, float) and 0 < value <= 1):
        raise ValueError(
            f"wanted a number of batches >= 1, or a fraction > 0 and <= 1.0, found {shown(value)}"
        )
    found: int | float = value
    return found


def _steps_or_share(value: Any) -> int | float:
    """Return a number of steps (a whole number), or a share of all steps (a number with a point, below 1)."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_count and not (isinstance(value, float) and 0 <= value < 1):
        raise ValueError(
            f"wanted a number of steps >= 0, or a share of all >= 0 and < 1, found {shown(value)}"
        )
    found: int | float = value
    return found


StepsOrShare = Annotated[int | float, BeforeValidator(_steps_or_share)]
BatchLimits = dict[str, Annotated[int | float, BeforeValidator(_part)]]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
NonNegativeWhole = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_not_bool), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, AfterValidator(_safe_name)]
Url = Annotated[str, Field(min_length=1), AfterValidator(refuse_in_url)]
CountOrAuto = Annotated[Count | Literal["auto"], WrapValidator(_count_or_auto)]
ExperimentId = Annotated[str, AfterValidator(_experiment_id)]
RunnerPath = Annotated[str, AfterValidator(_runner)]
Slots = dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], Annotated[int, Field(ge=1)]]
StorageBlock = Annotated[str, AfterValidator(_storage_block)]
LocalFolder = Annotated[str, Field(min_length=1), AfterValidator(_local)]
FreeValues = Annotated[Values, AfterValidator(_free)]
StorageOptions = Annotated[Values, AfterValidator(_options)]

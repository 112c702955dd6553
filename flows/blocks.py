"""Reads a block of Prefect that holds a store's credentials, and says which variables mean the same to a client."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from danling_core.errors import ConfigError
from danling_core.secrets import redact

_CLASSES = {
    "aws-credentials": ("prefect_aws", "AwsCredentials"),
    "minio-credentials": ("prefect_aws", "MinIOCredentials"),
    "gcp-credentials": ("prefect_gcp", "GcpCredentials"),
}


@dataclass(frozen=True, repr=False)
class Credentials:
    """Contents of a block. Never shown: it holds secrets.

    Args:
        variables: of the environment; None where one has to be absent.
        key: a Google service account's, which clients read from a file.
    """

    variables: dict[str, str | None]
    key: dict[str, Any] | None = None


def read_block(name: str) -> Credentials:
    """Return the content of the block `name` ("aws-credentials/prod"), read from the Prefect API in use.

    Raises:
        ConfigError: it cannot be read, or says what no variable can.
    """
    kind, _, document = name.partition("/")
    module, class_name = _CLASSES[kind]
    block = _load(name, document, module, class_name)
    if kind == "aws-credentials":
        return Credentials(_of_aws(name, block))
    return Credentials(_of_minio(name, block)) if kind == "minio-credentials" else _of_gcp(block)


def _load(name: str, document: str, module: str, class_name: str) -> Any:
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    package = module.replace("_", "-")
    try:
        block_class = getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        raise ConfigError(
            f"storage_block {name!r} needs {package}, which cannot be imported here ({error}): "
            f"pip install 'danling-flows[{package}]'"
        ) from error
    where = f"storage_block {name!r} at the Prefect API {redact(str(PREFECT_API_URL.value()))}"
    try:
        return block_class.load(document, _sync=True)
    except ValueError as error:
        if isinstance(error.__cause__, ObjectNotFound):
            raise ConfigError(f"there is no {where}; see `prefect block ls`") from None
        # The message of a validation repeats what it refuses.
        raise ConfigError(
            f"{where} is no valid {class_name} ({type(error).__name__}); save it anew"
        ) from None
    except Exception as error:
        raise ConfigError(f"cannot read {where}: {type(error).__name__}: {redact(str(error))}") from error


def _of_aws(name: str, block: Any) -> dict[str, str | None]:
    if block.assume_role_arn:
        raise ConfigError(
            f"storage_block {name!r} assumes the role {block.assume_role_arn}, whose keys would expire while a "
            "run trains: name a profile with that role_arn in the block instead, which the client renews"
        )
    identity = {
        "AWS_ACCESS_KEY_ID": block.aws_access_key_id,
        "AWS_SECRET_ACCESS_KEY": _revealed(block.aws_secret_access_key),
        "AWS_SESSION_TOKEN": block.aws_session_token,
        "AWS_PROFILE": block.profile_name,
    }
    # All of them, or none: half of the block's and half of the environment's log in as no one.
    return {**(identity if any(identity.values()) else {}), **_of_client(name, block)}


def _of_minio(name: str, block: Any) -> dict[str, str | None]:
    return {
        "AWS_ACCESS_KEY_ID": block.minio_root_user,
        "AWS_SECRET_ACCESS_KEY": _revealed(block.minio_root_password),
        "AWS_SESSION_TOKEN": None,
        "AWS_PROFILE": None,
        **_of_client(name, block),
    }


def _of_client(name: str, block: Any) -> dict[str, str | None]:
    client = block.aws_client_parameters
    if client.config or client.api_version or client.verify is False or not client.use_ssl:
        raise ConfigError(
            f"storage_block {name!r}: of its client parameters only endpoint_url and verify_cert_path are "
            "understood; give others as storage_options of the config"
        )
    found: dict[str, str | None] = {}
    if block.region_name:
        found["AWS_DEFAULT_REGION"] = block.region_name
    if client.endpoint_url:
        # The second would go before the first.
        found |= {"AWS_ENDPOINT_URL": client.endpoint_url, "AWS_ENDPOINT_URL_S3": None}
    if client.verify_cert_path:
        found["AWS_CA_BUNDLE"] = str(client.verify_cert_path)
    return found


def _of_gcp(block: Any) -> Credentials:
    found: dict[str, str | None] = {"GOOGLE_CLOUD_PROJECT": block.project} if block.project else {}
    if block.service_account_file:
        found["GOOGLE_APPLICATION_CREDENTIALS"] = str(block.service_account_file)
    return Credentials(found, _revealed(block.service_account_info))


def _revealed(secret: Any) -> Any:
    return None if secret is None else secret.get_secret_value()

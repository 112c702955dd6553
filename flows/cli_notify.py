"""`danling notify`: messages to a chat or any webhook about runs that fail, and groups that end."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import yaml

from danling_core.errors import ConfigError, DanLingError
from flows.cli_deploy import configured_api
from flows.cli_text import say
from flows.exit_codes import DONE

_BLOCK = "danling"
_TEMPLATE = "notifications.yaml"


class NotifyError(DanLingError):
    """The webhook did not take a message; nothing was changed in Prefect."""


def notify(url: str) -> int:
    """Send a first message to `url`, and have Prefect send the others from now on; `off` ends that.

    Args:
        url: of the webhook; `-` reads it from standard input, so that no history of a shell has it.
    """
    if url == "-":
        url = sys.stdin.readline().strip()
    configured_api()
    if url == "off":
        return _forget()
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise ConfigError("the URL of a webhook begins with https:// or http://, or is `off` or `-`")
    _try(url)
    block_id = str(_block(url).save(_BLOCK, overwrite=True))
    for wanted in _automations(block_id):
        is_made = _put(wanted)
        say(f"{'made' if is_made else 'changed'} the automation {wanted['name']!r}")
    say("a first message has been sent; `danling notify off` ends it")
    return DONE


def _block(url: str) -> Any:
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    # The URL may hold a token: it is a secret of the block.
    return CustomWebhookNotificationBlock(
        name=_BLOCK, url="{{url}}", json_data=_message("{{subject}}", "{{body}}"), secrets={"url": url}
    )


def _message(subject: str, body: str) -> dict[str, str]:
    return {"text": f"{subject}\n{body}", "subject": subject, "body": body}


def _try(url: str) -> None:
    import httpx

    first = _message("danling", "Runs that fail and groups that end are told here from now on.")
    try:
        answer = httpx.post(url, json=first, timeout=10.0)
    except httpx.HTTPError as error:
        raise NotifyError(f"the webhook cannot be reached: {type(error).__name__}: {error}") from None
    if not answer.is_success:
        said = " ".join(answer.text.split())[:200]
        raise NotifyError(
            f"the webhook does not take a message: it answers {answer.status_code} {said}".rstrip()
        )


def _automations(block_id: str) -> list[dict[str, Any]]:
    text = (resources.files("flows") / "templates" / _TEMPLATE).read_text()
    loaded: list[dict[str, Any]] = yaml.safe_load(text.replace("BLOCK", block_id))["automations"]
    return loaded


def _put(wanted: dict[str, Any]) -> bool:
    """Make an automation, or change the one of its name; return whether it was made."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        known = {
            each["name"]: each["id"] for each in client.request("POST", "/automations/filter", json={}).json()
        }
        if wanted["name"] in known:
            client.request("PUT", "/automations/{id}", path_params={"id": known[wanted["name"]]}, json=wanted)
            return False
        client.request("POST", "/automations/", json=wanted)
        return True


def _forget() -> int:
    from prefect.client.orchestration import get_client

    names = [each["name"] for each in _automations("none")]
    with get_client(sync_client=True) as client:
        for each in client.request("POST", "/automations/filter", json={}).json():
            if each["name"] in names:
                client.request("DELETE", "/automations/{id}", path_params={"id": each["id"]})
                say(f"deleted the automation {each['name']!r}")
    return DONE

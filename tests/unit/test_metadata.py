"""What a run's metadata says, and what it must not say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from urllib.parse import quote

import pytest

from danling_core.runs import metadata
from danling_core.secrets import looks_secret, redact, redact_command

SECRET = "canary-secret-7f3a9b2c"


@pytest.fixture
def repository(tmp_path: os.PathLike[str]) -> str:
    folder = os.fspath(tmp_path)

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)

    git("init", "-b", "main")
    with open(os.path.join(folder, "code.py"), "w") as file:
        file.write("x = 1\n")
    git("add", ".")
    git("commit", "-m", "one")
    return folder


def test_metadata_is_json_and_says_where_and_with_what() -> None:
    found = json.loads(json.dumps(metadata.collect(group="sweep")))
    assert found["group"] == "sweep" and found["host"] and found["user"] and found["command"]
    assert found["packages"]["torch"] and found["packages"]["pydantic"]
    assert found["hardware"]["cores"] >= 1 and found["hardware"]["memory_bytes"] > 2**20
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_git_says_commit_and_difference(repository: str) -> None:
    clean = metadata.git_state(repository)
    assert clean is not None and len(clean["commit"]) == 40 and clean["branch"] == "main"
    assert not clean["is_dirty"] and clean["diff"] == ""
    with open(os.path.join(repository, "code.py"), "w") as file:
        file.write("x = 2\n")
    with open(os.path.join(repository, "new.py"), "w") as file:
        file.write("y = 1\n")
    dirty = metadata.git_state(repository)
    assert dirty is not None and dirty["is_dirty"]
    assert "+x = 2" in dirty["diff"] and dirty["untracked"] == ["new.py"]


def test_the_difference_can_be_applied(repository: str) -> None:
    with open(os.path.join(repository, "code.py"), "w") as file:
        file.write("x = 2\n")
    found = metadata.git_state(repository)
    assert found is not None
    with open(os.path.join(repository, "code.py"), "w") as file:
        file.write("x = 1\n")
    command = ["git", "apply", "--check"]
    done = subprocess.run(
        command, cwd=repository, input=found["diff"], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_repository_of_somebody_else_is_described_too(repository: str) -> None:
    """As in a container that runs as root over a mounted checkout."""
    for folder, _, _ in os.walk(repository):
        os.chown(folder, 65534, 65534)
    found = metadata.git_state(repository)
    assert found is not None and found["branch"] == "main" and not found["is_dirty"]


def test_outside_git_there_is_nothing_to_say(tmp_path: os.PathLike[str]) -> None:
    assert metadata.git_state(os.fspath(tmp_path)) is None


def test_a_large_difference_is_cut(repository: str) -> None:
    with open(os.path.join(repository, "code.py"), "w") as file:
        file.write("ü = 1\n" * 100_000)
    found = metadata.git_state(repository)
    assert found is not None and found["diff_is_cut"]
    assert len(found["diff"].encode()) <= metadata.DIFF_LIMIT_BYTES


def test_no_secret_of_the_environment_or_the_command_is_kept(
    repository: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("DATABASE_URL", "postgres://me:pg-pass-12345@db/x")
    monkeypatch.setattr(
        sys, "orig_argv", ["danling", "run", f"--api-key={SECRET[::-1]}", "--token", "abc", SECRET]
    )
    with open(os.path.join(repository, "code.py"), "w") as file:
        file.write(f"key = '{SECRET}'; other = 'pg-pass-12345'\n")
    text = json.dumps(metadata.collect(repository))
    for secret in (SECRET, SECRET[::-1], "pg-pass-12345"):
        assert secret not in text
    assert json.loads(text)["command"] == ["danling", "run", "--api-key=***", "--token", "***", "***"]


def test_commands_keep_what_is_no_secret() -> None:
    command = [
        "danling",
        "run",
        "params.max_tokens=512",
        "optim.lr=1e-3",
        "--verbose",
        "params.api_key=x",
        "-t",
        "x",
    ]
    shown = redact_command(command)
    assert shown == [*command[:5], "params.api_key=***", *command[6:]]
    assert redact_command(["--password", "--quiet", "a"]) == ["--password", "--quiet", "a"]
    assert redact("https://u:pw@h/p?x=1&token=abc&y=2") == "https://***@h/p?x=1&token=***&y=2"


@pytest.mark.parametrize("secret", ["12345", "1234567890", "hunter2", 'it\'s a \\ "secret"\nof two lines é'])
def test_a_secret_is_hidden_in_every_form_and_numbers_like_it_are_not(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("DB_PASSWORD", secret)
    for form in (secret, repr(secret), json.dumps(secret), quote(secret), f"password {secret}, refused"):
        assert secret not in redact(form) and "***" in redact(form)
    assert redact("loss 0.12345 at 212345") == "loss 0.12345 at 212345"


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("HF_TOKEN", "aws-secret-access-key", "PGPASSWORD", "MYSQL_PWD")),
        *(
            (name, True)
            for name in ("OPENAI_KEY", "GITHUB_PAT", "SLACK_WEBHOOK_URL", "SENTRY_DSN", "API_JWT")
        ),
        *(
            (name, True)
            for name in ("PREFECT_API_AUTH_STRING", "Authorization", "http.cookie", "AWS_ACCESS_KEY_ID")
        ),
        *((name, False) for name in ("TOKENIZERS", "PWD_HISTORY", "AUTHOR", "COMPASS", "monkey", "AUTH_URL")),
    ],
)
def test_secrets_are_known_by_their_usual_names(name: str, is_secret: bool) -> None:
    assert looks_secret(name) == is_secret


def test_attempts_stay_few() -> None:
    facts: dict[str, object] = {"name": "digits"}
    for number in range(200):
        facts = metadata.with_attempt(facts, metadata.attempt_entry(generation=number))
    attempts = facts["attempts"]
    assert isinstance(attempts, list) and len(attempts) == metadata.ATTEMPTS_KEPT
    assert facts["attempts_total"] == 200
    assert attempts[0]["generation"] == 0 and attempts[-1]["generation"] == 199

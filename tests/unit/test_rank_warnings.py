"""What ranks warn of is said where the command was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.rank_warnings import RankWarnings


def test_each_warning_is_passed_on_once_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "run.log"
    log.write_text("2026-11-28T04:06:25Z WARNING of an attempt before\n")
    warnings = RankWarnings("toy-0123", str(log))
    warnings.pass_on()
    with log.open("ab") as file:
        file.write(
            b"2026-11-28T04:06:25Z WARNING params.a is \x1b[2J odd \xff\n2026-11-28T04:06:26Z started\nprint"
        )
        file.write(b"ed WARNING by a user\n2026-11-28T04:06:27Z WARNING half a l")
        file.flush()
        warnings.pass_on()
        file.write(b"ine\n2026-11-28T04:06:28Z WARNING interrupted: by SIGTERM; run it again to resume\n")
    warnings.pass_on()
    warnings.pass_on()
    assert [record.getMessage() for record in caplog.records] == [
        "toy-0123: params.a is \\u001b[2J odd \ufffd",
        "toy-0123: half a line",
    ]


def test_a_log_that_is_not_there_has_no_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RankWarnings("toy", str(tmp_path / "none" / "run.log")).pass_on()
    assert not caplog.records

"""`danling verify` and `danling reproduce`: proofs about a run that anyone can ask for."""

from __future__ import annotations

from flows.cli_text import say


def verify_run(root: str, run: str) -> int:
    """Print what is wrong with a run, then one line; return 1 if anything is damaged."""
    from danling_core.runs.finding import resolve
    from danling_core.tools.verify import verify

    report = verify(resolve(root, run).url)
    for finding in report.findings:
        say(finding)
    read = f"{report.checkpoints} checkpoint(s) of {report.checkpoint_bytes:,} bytes, {report.events} events"
    say(f"{'good' if report.is_good else 'DAMAGED'}: {report.url}: {read}")
    if report.not_bitwise is not None:
        say(f"not bitwise: {report.not_bitwise}")
    if report.unchecked:
        names = ", ".join(report.unchecked[:8]) + (", ..." if len(report.unchecked) > 8 else "")
        say(f"not checked, for nothing vouches for them: {names}")
    return 0 if report.is_good else 1


def reproduce_epoch(root: str, run: str, epoch: int, from_start: bool) -> int:
    """Print how a replayed epoch compares; return 1 if it differs."""
    from danling_core.runs.finding import resolve
    from danling_core.tools.reproduce import reproduce

    report = reproduce(resolve(root, run).url, epoch, from_start=from_start)
    say(report)
    return 0 if report.is_identical else 1

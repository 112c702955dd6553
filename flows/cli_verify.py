"""`danling verify` and `danling reproduce`: proofs about a run that anyone can ask for."""

from __future__ import annotations

import argparse

from flows.cli_parsers import add_command, add_run

_VERIFY = """\
examples:
  danling verify digits-cnn-baseline
  danling verify 0123abcd --root s3://bucket/experiments

exit codes: 0 all is good, 1 something is damaged, 2 there is no such run
"""
_REPRODUCE = """\
examples:
  danling reproduce digits-cnn-baseline --epoch 3
  danling reproduce digits-cnn-baseline --epoch 3 --from-start

It begins with the checkpoint before epoch N: with save_interval: 1 every epoch keeps one. Without it, --from-start
trains the epochs before it, too. Run it from the folder that the run was started in, so that its runner is found,
and with the same code.
exit codes: 0 identical, 1 something differs, 2 it cannot be replayed
"""


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add both commands, each with its function as `command`."""
    verify = add_command(commands, "verify", "check every committed file of a run", _VERIFY)
    add_run(verify)
    verify.set_defaults(command=run_verify)
    reproduce = add_command(
        commands, "reproduce", "train one epoch again and compare it bit for bit", _REPRODUCE
    )
    add_run(reproduce)
    reproduce.add_argument("--epoch", type=int, required=True, metavar="N", help="the first epoch is 0")
    reproduce.add_argument("--from-start", action="store_true", help="do not begin with a checkpoint")
    reproduce.set_defaults(command=run_reproduce)


def run_verify(arguments: argparse.Namespace) -> int:
    """Print what is wrong with a run, then one line; 1 if anything is damaged."""
    from danling_core.runs.folder import resolve
    from danling_core.tools.verify import verify

    report = verify(resolve(arguments.root, arguments.run).url)
    for finding in report.findings:
        print(finding)
    read = f"{report.checkpoints} checkpoint(s) of {report.checkpoint_bytes:,} bytes, {report.events} events"
    print(f"{'good' if report.is_good else 'DAMAGED'}: {report.url}: {read}")
    return 0 if report.is_good else 1


def run_reproduce(arguments: argparse.Namespace) -> int:
    """Print how a replayed epoch compares; 1 if it differs."""
    from danling_core.runs.folder import resolve
    from danling_core.tools.reproduce import reproduce

    url = resolve(arguments.root, arguments.run).url
    report = reproduce(url, arguments.epoch, from_start=arguments.from_start)
    print(report)
    return 0 if report.is_identical else 1

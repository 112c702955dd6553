"""Real processes for what tests/unit/test_stopping.py tries without them."""

from __future__ import annotations

from danling_core.errors import RunInterrupted
from danling_core.parallel.stopping import Stopping, share
from tests.ranks import Ranks


def nodes_of_this_rank() -> tuple[int, bool, bool]:
    """As if each rank were on a machine of its own: its nodes, whether it owns its block, whether both stop."""
    import os
    import shutil

    shared = share(f"host-{os.environ['RANK']}")
    shutil.rmtree(shared.folder)
    stopping = Stopping(shared.control, is_main=os.environ["RANK"] == "0", nodes=shared.nodes)
    if os.environ["RANK"] == "1":
        shared.control.request_stop()
    for step in range(3, 16):
        stopping.check(step)
    try:
        stopping.check(16)
    except RunInterrupted:
        return shared.nodes, shared.is_owner, True
    return shared.nodes, shared.is_owner, False


def test_ranks_on_two_nodes_stop_together_whichever_was_asked(two_ranks: Ranks) -> None:
    assert two_ranks.run(nodes_of_this_rank) == [(2, True, True), (2, True, True)]

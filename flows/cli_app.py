"""The application `danling`, and the parameters that several of its commands have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated, Literal

from cyclopts import App, Parameter

from flows import exit_codes

OVERRIDES = """\
Overrides are dotted: params.lr=0.01, dataloader.batch_size=64, scheduler=null.
Values are read as YAML. `danling keys` lists every key, with its default.
"""

Run = Annotated[str, Parameter(help="name, id, the beginning of an id, or a folder")]
Root = Annotated[str, Parameter(help="project root of RUN", show_default=True)]
Endpoint = Annotated[
    str | None, Parameter(help="of an S3-compatible store; default: AWS_ENDPOINT_URL", name="--endpoint-url")
]
File = Annotated[str, Parameter(help="a YAML or JSON file, local or at a URL")]
Overrides = Annotated[str, Parameter(help="dotted changes of every run's config: key=value")]
Fresh = Annotated[bool, Parameter(help="begin new run folders, whatever is there")]
Busy = Annotated[
    Literal["follow", "wait", "fail"],
    Parameter(
        help="where another process has a run in work: show its epochs and end as it does (and take over if it dies), "
        "wait for its end and go on then, or fail",
        show_default=True,
    ),
]
Pool = Annotated[str, Parameter(help="work pool, of type process", show_default=True)]
Verbose = Annotated[bool, Parameter(help="show Prefect's log lines too")]
Json = Annotated[bool, Parameter(help="print JSON")]
Status = Literal["running", "complete", "failed", "interrupted", "unknown"]


def _version() -> str:
    try:
        return f"danling {metadata.version('danling-flows')}"
    except metadata.PackageNotFoundError:
        return "danling (not installed)"


app = App(
    name="danling",
    help="PyTorch experiments as Prefect flows.",
    help_epilogue=f"""\
examples:
  danling run examples/digits/run.yaml                   train one run
  danling run examples/digits/run.yaml params.lr=0.003   another learning rate
  danling experiment examples/digits/experiment.yaml     the runs of a sweep
  danling group examples/digits/group.yaml               with a leaderboard
  danling runs experiments --status complete             what there is
  danling show digits-cnn-baseline                       one run, its results
  danling --install-completion                           for this shell

{exit_codes.MEANINGS}""",
    help_format="plaintext",
    version=_version,
    result_action="return_value",
    default_parameter=Parameter(negative=(), show_default=False),
)
app.register_install_completion_command()


@contextlib.contextmanager
def endpoint(url: str | None) -> Iterator[None]:
    """Reach stores at `url` inside the block, where it is given."""
    if url is None:
        yield
        return
    from danling_core import storage

    with storage.using({"endpoint_url": url}):
        yield

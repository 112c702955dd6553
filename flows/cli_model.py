"""Commands of `danling` that look at one model or run, in this process and without Prefect."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from flows.cli_app import Endpoint, File, Overrides, Root, Run, app, endpoint


@app.command(
    help_epilogue="""\
examples:
  danling summary examples/digits/run.yaml
  danling summary examples/digits/run.yaml params.width=64"""
)
def summary(config: File, /, *overrides: Overrides) -> int:
    """Show the modules of a config's model, with the shapes of one batch, parameters and memory."""
    from flows.cli_summary import print_summary

    return print_summary(config, overrides)


@app.command(
    help_epilogue="""\
examples:
  danling predict digits-cnn-baseline --split test --out predictions.npy
  danling predict 0123abcd --split test --out s3://bucket/test.safetensors dataloader.batch_size=256
  danling predict digits-cnn-baseline --split val --out val.parquet --checkpoint epoch-3

They are what infer_step returns, with a row for each sample, in the order of the
data set: in .npy one array, in .safetensors and .parquet several by name."""
)
def predict(
    run: Run,
    /,
    *overrides: Overrides,
    split: Annotated[str, Parameter(help="of the run's data")],
    out: Annotated[str, Parameter(help="a .npy, .safetensors or .parquet file, local or at a URL")],
    checkpoint: Annotated[str, Parameter(help="best, latest, epoch-N", show_default=True)] = "best",
    root: Root = "experiments",
    endpoint_url: Endpoint = None,
) -> int:
    """Write a run's predictions for a split to a file, in this process."""
    from flows.cli_predict import predict_split

    with endpoint(endpoint_url):
        return predict_split(root, run, checkpoint, split, out, overrides)


@app.command(
    help_epilogue="""\
examples:
  danling verify digits-cnn-baseline
  danling verify 0123abcd --root s3://bucket/experiments

exit codes: 0 good, 1 something is damaged, 2 there is no such run"""
)
def verify(run: Run, /, *, root: Root = "experiments", endpoint_url: Endpoint = None) -> int:
    """Check every committed file of a run."""
    from flows.cli_verify import verify_run

    with endpoint(endpoint_url):
        return verify_run(root, run)


@app.command(
    help_epilogue="""\
examples:
  danling reproduce digits-cnn-baseline --epoch 3
  danling reproduce digits-cnn-baseline --epoch 3 --from-start

It begins with the checkpoint before epoch N: with save_interval: 1 every epoch
keeps one. Without it, --from-start trains the epochs before it, too. Run it from
the folder that the run was started in, so that its runner is found, and with the
same code.
exit codes: 0 identical, 1 something differs, 2 it cannot be replayed"""
)
def reproduce(
    run: Run,
    /,
    *,
    epoch: Annotated[int, Parameter(help="the first epoch is 0")],
    from_start: Annotated[bool, Parameter(help="do not begin with a checkpoint")] = False,
    root: Root = "experiments",
    endpoint_url: Endpoint = None,
) -> int:
    """Train one epoch again and compare it bit for bit."""
    from flows.cli_verify import reproduce_epoch

    with endpoint(endpoint_url):
        return reproduce_epoch(root, run, epoch, from_start)

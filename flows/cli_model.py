"""Commands of `danling` that look at one model or run, in this process and without Prefect."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

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


tune = App(
    name="tune",
    help="Try a setting for a few steps, and propose a value: lr, batch.",
    help_epilogue="""\
examples:
  danling tune lr examples/digits/run.yaml
  danling tune batch examples/digits/run.yaml""",
)
app.command(tune)


@tune.command(
    name="lr",
    help_epilogue="""\
examples:
  danling tune lr examples/digits/run.yaml
  danling tune lr examples/digits/run.yaml --steps 200 --highest 10 --out lr.svg

A range test: the rate grows from step to step, and the loss is looked at. On
one rank; where the config has more, as many batches make a step.""",
)
def tune_lr(
    config: File,
    /,
    *overrides: Overrides,
    lowest: Annotated[float, Parameter(help="rate of the first step", show_default=True)] = 1e-7,
    highest: Annotated[float, Parameter(help="rate of the last step", show_default=True)] = 1.0,
    steps: Annotated[int, Parameter(help="optimizer steps", show_default=True)] = 100,
    out: Annotated[str | None, Parameter(help="draw the curve into an .svg file")] = None,
) -> int:
    """Find a learning rate by a range test; nothing is kept of it."""
    from flows.cli_tune import tune_rate

    return tune_rate(config, overrides, lowest, highest, steps, out)


@tune.command(
    name="batch",
    help_epilogue="""\
examples:
  danling tune batch examples/digits/run.yaml
  danling tune batch examples/digits/run.yaml --largest 4096""",
)
def tune_batch(
    config: File,
    /,
    *overrides: Overrides,
    largest: Annotated[int | None, Parameter(help="try no larger size")] = None,
    steps: Annotated[int, Parameter(help="steps of each trial", show_default=True)] = 5,
) -> int:
    """Find the largest batch that fits, and how fast each size is; nothing is kept of it."""
    from flows.cli_tune import tune_batch

    return tune_batch(config, overrides, largest, steps)


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
  danling export digits-cnn-baseline --out exported
  danling export digits-cnn-baseline --out model.safetensors --average 5
  danling export 0123abcd --out s3://bucket/model.onnx --checkpoint epoch-3

A folder gets model.safetensors, config.yaml and a model card, and what
save_pretrained writes where the model has it. .safetensors: weights alone.
.pt2 (torch.export), .onnx (extra `onnx`) and .ts (TorchScript): the model with
its code, as infer_step calls it; loaded again and compared.""",
)
def export(
    run: Run,
    /,
    *overrides: Overrides,
    out: Annotated[
        str, Parameter(help="a folder, or a .safetensors, .pt2, .onnx or .ts file, local or at a URL")
    ],
    checkpoint: Annotated[str, Parameter(help="best, latest, epoch-N", show_default=True)] = "best",
    average: Annotated[int, Parameter(help="mean of the weights of the K checkpoints up to it")] = 1,
    root: Root = "experiments",
    endpoint_url: Endpoint = None,
) -> int:
    """Write a run's model for use without danling."""
    from flows.cli_export import export_model

    with endpoint(endpoint_url):
        return export_model(root, run, out, checkpoint, average, overrides)


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

"""The config: strict where it helps, exact in text, free of secrets, and canonical for identity."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import danling_core
from danling_core.config import Config, FreeParams, Params
from danling_core.config.elsewhere import NAMES
from danling_core.config.sections import AverageConfig, OptimConfig, SchedulerConfig
from danling_core.errors import ConfigError

AWKWARD: dict[str, Any] = {
    "small": 1e-3,
    "tiny": 5e-324,
    "large": 1e16,
    "negative_zero": -0.0,
    "third": 1 / 3,
    "whole": 1,
    "float": 1.0,
    "big": 2**70,
    "unicode": "数据 é \U0001f600 \x85 \u2028 \ufeff",
    "texts": [
        "1e-3",
        "1",
        "0x10",
        "0o7",
        "007",
        "1_000",
        "true",
        "yes",
        "no",
        "null",
        "~",
        "",
        " ",
        "- a",
        "a: b",
        "#c",
    ],
    "more": [
        "=",
        "<<",
        "2026-11-21",
        "1:30",
        ".inf",
        ".5",
        "+1",
        "!x",
        "&a",
        "*a",
        "%",
        "@",
        "`",
        "a\nb\n",
        "\ta",
        "'\"",
    ],
    "long": "word " * 60,
    "nested": [[1, [2.0, None]], {"a": {"b": []}}, {}],
    "nothing": None,
    "flags": [True, False],
    "<<": "merge",
    "yes": "key",
    "1": "key",
    "": "empty key",
    "dotted.key": 1,
}


def config(**values: Any) -> Config:
    return Config(**{"epoch_end": 3, **values})


def refusal(**values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**values)
    return str(caught.value)


# reading -----------------------------------------------------------------------
def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "experiment_name: digits-cnn\nrunner: examples.digits:CNNRunner\nepoch_end: 30\npatience: 5\n"
        "score_name: accuracy\ndataloader: {batch_size: 64, train: {shuffle: true}}\n"
        "optim: {name: adamw, lr: 1e-3}\nscheduler: {name: cosine, warmup_steps: 50}\n"
        "params: {width: 32, dropout: 0.1}\nnproc_per_node: 2\n"
    )
    read = Config.load(file)
    assert read.optim is not None and read.optim.lr == 0.001
    assert read.params == {"width": 32, "dropout": 0.1}
    assert read.nproc_per_node == 2
    assert read.dataloader.for_split("train", training=True).batch_size == 64


def test_locations_in_a_file_stay_relative_to_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("epoch_end: 1\nproject_root: here\nrunner: my/runner.py:Mine\n")
    read = Config.load(tmp_path / "run.yaml")
    assert (read.project_root, read.runner) == ("here", "my/runner.py:Mine")


def test_merge_keys_and_anchors_of_yaml_are_understood() -> None:
    read = Config.from_yamls("epoch_end: 1\nparams: {a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}, c: {<<: *a}}\n")
    assert read.params["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "found nothing"),
        ("- 1\n", "found a list"),
        ("seed: 1\nseed: 2\n", "line 2: not valid YAML: key 'seed' is given twice (first on line 1)"),
        (
            "params:\n  a: 1\n  b: 2\n  a: 1\n",
            "line 4: not valid YAML: key 'a' is given twice (first on line 2)",
        ),
        ("a: [1\nb: 2\n", "line 2: not valid YAML"),
        ("a: \x00\n", "line 1: not valid YAML"),
        ("a: &a [*a]\n", "levels of nesting"),
        ("params: &a {a: *a}\n", "levels of nesting"),
        ("a: !!python/object:os.system x\n", "line 1: not valid YAML"),
        ("1: 2\n", "wanted text as a key, found 1"),
        ("epoch_end: 1\nparams: {1: a}\n", "wanted text (put it in quotes), found 1"),
        ("epoch_end: 1\nparams: {a: .inf}\n", "params: at 'a', wanted a finite number"),
        ("epoch_end: 1\nparams: {a: [1, .nan]}\n", "params: at 'a[1]', wanted a finite number"),
    ],
)
def test_a_bad_file_gives_one_message_with_its_name(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(file)
    assert wanted in str(caught.value)
    assert str(caught.value).count(str(file)) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("{", "line 1: not valid JSON"), ('{"seed": 1, "seed": 2}', "twice"), ("[]", "found a list")],
)
def test_a_bad_json_file_gives_one_message_with_its_name(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    for read in (Config.load, Config.from_json):
        with pytest.raises(ConfigError) as caught:
            read(file)
        assert wanted in str(caught.value) and str(caught.value).count(str(file)) == 1


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing.yaml: cannot be read: No such file"):
        Config.load(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        Config.load(tmp_path)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"group: \xff\n")
    with pytest.raises(ConfigError, match="wanted UTF-8 text"):
        Config.load(tmp_path / "run.yaml")


# what is refused ---------------------------------------------------------------
@pytest.mark.holds("config-1")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": True}, "seed: wanted a number, found true"),
        ({"seed": -1}, "seed: wanted a number >= 0, found -1"),
        ({"epoch_end": "ten"}, "epoch_end: wanted a whole number, found 'ten'"),
        ({"epoch_end": 3.5}, "epoch_end: wanted a whole number, found 3.5"),
        ({"epoch_end": 0}, "epoch_end: wanted a number >= 1, found 0"),
        ({"max_seconds": float("nan")}, "max_seconds: wanted a number > 0, found nan"),
        ({"max_seconds": float("inf")}, "max_seconds: wanted a finite number, found inf"),
        ({"max_seconds": True}, "max_seconds: wanted a number, found true"),
        ({"optim": {"name": "sgd", "lr": -1}}, "optim.lr: wanted a number >= 0, found -1"),
        ({"optim": {"lr": 0.1}}, "optim.name: is missing"),
        ({"optim": "sgd"}, "optim: wanted a mapping of keys, found 'sgd'"),
        ({"ema_decay": 1}, "ema_decay: wanted a number < 1, found 1"),
        ({"precision": "fp8"}, "precision: wanted 'fp32', 'bf16' or 'fp16', found 'fp8'"),
        ({"nproc_per_node": 0}, "nproc_per_node: wanted a number >= 1 or 'auto', found 0"),
        ({"nproc_per_node": "all"}, "nproc_per_node: wanted a number >= 1 or 'auto', found 'all'"),
        ({"run_name": 7}, "run_name: wanted text (put it in quotes), found 7"),
        ({"params": None}, "params: wanted a mapping of keys, found null"),
        (
            {"params": {"a": {1, 2}}},
            "params: at 'a', wanted null, true, false, a number, text, a list or a mapping",
        ),
        (
            {"dataloader": {"val": {"batch_size": 0}}},
            "dataloader.val.batch_size: wanted a number >= 1, found 0",
        ),
        ({"epoch_ned": 3}, "unknown key 'epoch_ned': did you mean 'epoch_end'?"),
        ({"lr": 0.1}, "unknown key 'lr': did you mean 'optim.lr' or 'params.lr'?"),
        (
            {"batch_size": 8},
            "unknown key 'batch_size': did you mean 'dataloader.batch_size' or 'params.batch_size'?",
        ),
        (
            {"width": 8},
            "unknown key 'width': a hyperparameter of your own goes under 'params', as 'params.width'",
        ),
        (
            {"dataloader": {"batch_sise": 8}},
            "dataloader: unknown key 'batch_sise': did you mean 'batch_size'?",
        ),
        (
            {"dataloader": {"val": {"shufle": 1}}},
            "dataloader.val: unknown key 'shufle': did you mean 'shuffle'?",
        ),
        ({"stages": []}, "stages: wanted 1 or more, found a list"),
        (
            {"runner": "digits.py"},
            "runner: wanted 'package.module:Class' or 'path/to/file.py:Class', found 'digits.py'",
        ),
        ({"scratch": "s3://bucket"}, "scratch: wanted a local folder, found a URL"),
        (
            {"step_end": 3},
            "epoch_end and step_end are both given: only one can end training (set the other to null)",
        ),
        (
            {"epoch_end": None},
            "one of epoch_end, step_end, iter_end must be given: it says when training ends",
        ),
        ({"experiments_root": "a", "project_root": "b"}, "experiments_root and project_root are both given"),
        ({"evaluate_interval_steps": 3}, "evaluate_interval_steps needs step_end or iter_end"),
    ],
)
def test_a_refusal_names_the_key_what_was_wanted_and_what_was_found(
    values: dict[str, Any], message: str
) -> None:
    assert message in refusal(**values)


@pytest.mark.parametrize("name", ["a/b", "..", ".a", "a\nb", "", " a", "a:b", "a*", "x" * 101, "a\\b"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    for field in ("experiment_name", "run_name", "name", "group"):
        assert field in refusal(**{field: name})


def test_all_problems_are_told_at_once() -> None:
    assert refusal(seed=True, epoch_end="ten").splitlines() == [
        "2 problems:",
        "  seed: wanted a number, found true",
        "  epoch_end: wanted a whole number, found 'ten'",
    ]


def test_what_pydantic_converts_safely_is_accepted() -> None:
    assert config(epoch_end=3.0).epoch_end == 3
    assert config(max_seconds=3).max_seconds == 3.0
    assert config(tensorboard="yes").tensorboard is True


@pytest.mark.holds("config-1")
def test_seed_zero_is_a_seed_and_a_config_is_frozen() -> None:
    made = config(seed=0)
    assert made.seed == 0
    with pytest.raises(ValidationError, match="frozen"):
        made.seed = 1


def test_older_names_are_accepted_everywhere() -> None:
    made = Config.load({"epoch_end": 1, "experiments_root": "a", "index_set": "val"}, ["index=acc"])
    assert (made.project_root, made.score_split, made.score_name) == ("a", "val", "acc")
    assert made.override(["experiments_root=b"]).project_root == "b"
    assert made.override({"index": "f1"}).score_name == "f1"


# text --------------------------------------------------------------------------
def exact(value: Any) -> str:
    """Tells apart what == does not: 1, 1.0 and True, 0.0 and -0.0."""
    return repr(value)


@pytest.mark.holds("config-4")
@pytest.mark.parametrize("key", AWKWARD)
def test_params_come_back_exactly_from_yaml_and_json(key: str) -> None:
    made = config(params={key: AWKWARD[key]})
    for back in (Config.from_yamls(made.yamls()), Config.from_jsons(made.jsons())):
        assert exact(back.params) == exact(made.params)
        assert back == made


def test_text_in_yaml_reads_the_same_with_a_reader_of_yaml_1_1() -> None:
    made = config(params={key: AWKWARD[key] for key in AWKWARD if key not in ("small", "tiny")})
    assert exact(yaml.safe_load(made.yamls())["params"]) == exact(made.params)


@pytest.mark.holds("config-4")
def test_a_file_written_is_a_file_read(tmp_path: Path) -> None:
    made = config(
        params=AWKWARD, optim={"name": "sgd", "lr": 1e-3, "betas": [0.9, 0.999]}, seed=7, stages=["train"]
    )
    made.yaml(tmp_path / "a.yaml")
    made.json(tmp_path / "a.json")
    assert Config.from_yaml(tmp_path / "a.yaml") == Config.from_json(tmp_path / "a.json") == made
    assert Config.load(tmp_path / "a.json") == Config.load(str(tmp_path / "a.yaml")) == made
    assert Config.from_dict(made.dict()) == made


def test_a_file_is_read_as_what_the_caller_says_whatever_its_name(tmp_path: Path) -> None:
    made = config(params={"x": 1})
    (tmp_path / "a.txt").write_text(made.jsons().replace("  ", "\t"))
    (tmp_path / "b.json").write_text(made.yamls())
    assert Config.from_json(tmp_path / "a.txt") == Config.from_yaml(tmp_path / "b.json") == made


def test_a_config_is_read_and_written_at_a_url() -> None:
    made = config(params={"x": 1e-3})
    made.yaml("memory://configs/run.yaml")
    made.json("memory://configs/run.json")
    assert Config.load("memory://configs/run.yaml") == Config.from_json("memory://configs/run.json") == made
    with pytest.raises(danling_core.NotFound, match="gone.yaml"):
        Config.load("memory://configs/gone.yaml")


def test_a_replaced_field_is_checked_again() -> None:
    assert config(params={"a": 1}).replace(params={"b": 2}).params == {"b": 2}
    with pytest.raises(ConfigError, match="seed: wanted"):
        config().replace(seed="x")


def test_what_a_caller_passes_in_is_not_shared_with_the_config() -> None:
    values = {"layers": [1, 2]}
    made = config(params=values)
    values["layers"].append(3)
    assert made.params == {"layers": [1, 2]}


@pytest.mark.holds("config-3")
@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E5", 1e5), (".5", 0.5), ("-0.0", -0.0), ("'1e-3'", "1e-3"), ("0x10", 16), ("007", 7)]
    + [
        ("yes", "yes"),
        ("2026-11-21", "2026-11-21"),
        ("1:30", "1:30"),
        ("True", True),
        ("~", None),
        ("1_0", "1_0"),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert exact(Config.from_yamls(f"epoch_end: 1\nparams: {{x: {text}}}").params["x"]) == exact(value)


def test_configs_survive_pickle_and_copy() -> None:
    made = config(params=AWKWARD, dataloader={"val": {"batch_size": 2}})
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


# canonical form ----------------------------------------------------------------
def test_the_canonical_form_is_independent_of_spelling() -> None:
    first = config(seed=1, optim={"name": "AdamW", "lr": 1, "weight_decay": 0}, params={"a": 1, "b": 2})
    optim = {"lr": 1.0, "weight_decay": 0.0, "name": "adamw"}
    second = Config.load({"params": {"b": 2, "a": 1}, "optim": optim, "seed": 1, "epoch_end": 3.0})
    assert json.dumps(first.canonical(), sort_keys=True) == json.dumps(second.canonical(), sort_keys=True)


def test_the_canonical_form_leaves_out_defaults_so_that_new_fields_change_nothing() -> None:
    class Grown(Config):
        novelty: bool = False

    written = {
        "epoch_end": 3,
        "accum_steps": 1,
        "dataloader": {"batch_size": 32, "train": {}},
        "deterministic": False,
    }
    assert Config.from_dict(written).canonical() == Grown.from_dict(written).canonical() == {"epoch_end": 3}
    assert Grown(epoch_end=3, novelty=True).canonical() == {"epoch_end": 3, "novelty": True}


@pytest.mark.parametrize(
    "values",
    [{"project_root": "s3://b/x"}, {"experiment_name": "x"}, {"run_name": "x"}, {"name": "x"}, {"group": "x"}]
    + [
        {"log_interval": 1},
        {"tensorboard": True},
        {"loggers": ["wandb"]},
        {"save_interval": 2},
        {"keep_last": 5},
        {"progress_bar": False},
    ]
    + [{"max_restarts": 0}, {"stages": ["train"]}, {"scratch": "/x"}, {"dataloader": {"pin_memory": True}}],
)
def test_what_cannot_change_a_result_is_not_in_the_canonical_form(values: dict[str, Any]) -> None:
    assert config(**values).canonical() == config().canonical()


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 1},
        {"params": {"a": 1}},
        {"optim": {"name": "sgd"}},
        {"dataloader": {"train": {"shuffle": False}}},
    ]
    + [
        {"nproc_per_node": 1},
        {"precision": "bf16"},
        {"runner": "a:B"},
        {"patience": 1},
        {"threads_per_rank": 2},
    ],
)
def test_what_can_change_a_result_is_in_the_canonical_form(values: dict[str, Any]) -> None:
    assert config(**values).canonical() != config().canonical()


def test_params_are_kept_whole() -> None:
    params: dict[str, Any] = {"a": None, "b": {}, "c": 1, "d": 1.0}
    assert exact(config(params=params).canonical()["params"]) == exact(params)


# secrets -----------------------------------------------------------------------
SECRET = "hunter2"


@pytest.mark.holds("config-5")
@pytest.mark.parametrize(
    "values",
    [
        {"params": {name: SECRET}}
        for name in ("password", "secret", "api_key", "apiKey", "API-KEY", "token", "hf_token")
    ]
    + [{"params": {"deep": [{"secret_key": SECRET}]}}, {"optim": {"name": "sgd", "token": SECRET}}]
    + [
        {"storage_options": {name: SECRET}}
        for name in ("key", "secret", "accesstoken", "account_key", "password")
    ]
    + [{"storage_options": {"client_kwargs": {"aws_secret_access_key": SECRET}}}]
    + [{"storage_options": {"headers": {"Authorization": SECRET}}}]
    + [
        {field: f"https://me:{SECRET}@host/x"}
        for field in ("project_root", "dir", "log_path", "checkpoint_dir")
    ]
    + [{"project_root": f"https://{SECRET}@host/x"}, {"scratch": f"s3://a:{SECRET}@b"}]
    + [
        {"storage_options": {"endpoint_url": f"https://me:{SECRET}@host"}},
        {"params": {"db": f"pg://me:{SECRET}@h/x"}},
    ]
    + [
        {"project_root": f"https://host/x?X-Amz-Signature={SECRET}"},
        {"password": SECRET},
        {"seed": f"s://a:{SECRET}@b"},
    ],
)
def test_a_secret_is_refused_and_never_repeated(values: dict[str, Any]) -> None:
    assert SECRET not in refusal(**values)
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"epoch_end": 1, **values})
    assert SECRET not in str(caught.value)


def test_a_secret_in_bad_yaml_or_an_override_is_never_repeated(tmp_path: Path) -> None:
    for text in (f"password: {SECRET}\n x: [", f"a: '{SECRET}\n", f"token: {SECRET}: x\n"):
        with pytest.raises(ConfigError) as caught:
            Config.from_yamls(text)
        assert SECRET not in str(caught.value)
    for override in (f"params.password={SECRET}", f"params.password=[{SECRET}", f"seed.token={SECRET}"):
        with pytest.raises(ConfigError) as caught:
            config().override([override])
        assert SECRET not in str(caught.value)


def test_what_only_sounds_like_a_secret_is_accepted() -> None:
    params = {
        "max_tokens": 5,
        "pad_token": "<pad>",
        "tokenizer": "bpe",
        "token": 3,
        "key": "x",
        "secret": None,
    }
    assert config(params=params).params == params
    options = {"anon": True, "endpoint_url": "http://localhost:9000", "token": "anon", "project": "p"}
    assert config(storage_options=options).storage_options == options
    for url in (
        "s3://bucket/a@b",
        "gs://b",
        "abfs://container@account.dfs.core.windows.net/x",
        "/a/b@c",
        "memory://x",
    ):
        assert config(project_root=url).project_root == url


# loaders -----------------------------------------------------------------------
@pytest.mark.holds("attributes-15")
def test_training_shuffles_and_keeps_its_last_batch_unless_told_otherwise() -> None:
    loaded = config().dataloader.for_split("train", training=True)
    assert (loaded.shuffle, loaded.drop_last, loaded.batch_size) == (True, False, 32)
    told = config(dataloader={"drop_last": True, "train": {"shuffle": False, "batch_size": 4}})
    loaded = told.dataloader.for_split("train", training=True)
    assert (loaded.shuffle, loaded.drop_last, loaded.batch_size) == (False, True, 4)


def test_evaluation_never_shuffles_and_never_drops() -> None:
    general = config(dataloader={"shuffle": True, "drop_last": True, "train": {"shuffle": True}}).dataloader
    for split in ("val", "train"):
        loaded = general.for_split(split, training=False)
        assert (loaded.shuffle, loaded.drop_last) == (False, False)
    told = config(dataloader={"val": {"drop_last": True}}).dataloader
    with pytest.raises(ConfigError, match=r"dataloader\.val\.drop_last"):
        told.for_split("val", training=False)
    assert not told.for_split("val", training=False, trained=True).drop_last


def test_options_of_loader_processes_count_only_where_there_are_some() -> None:
    options = {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4, "val": {"num_workers": 0}}
    section = config(dataloader=options).dataloader
    assert section.for_split("train", training=True).persistent_workers
    loaded = section.for_split("val", training=False)
    assert (loaded.persistent_workers, loaded.prefetch_factor) == (False, None)


# params ------------------------------------------------------------------------
@pytest.mark.holds("config-2")
def test_free_params_are_read_by_attribute_and_frozen() -> None:
    params = FreeParams(width=3, items=4, inner={"lr": 0.1}, layers=[1])
    assert params.items == params["items"]
    assert (params.width, params["items"], params["inner"].lr, {**params.inner}) == (3, 4, 0.1, {"lr": 0.1})
    assert params.model_dump() == {"width": 3, "items": 4, "inner": {"lr": 0.1}, "layers": [1]}
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    with pytest.raises(AttributeError, match="did you mean 'width'"):
        _ = params.widht
    with pytest.raises(AttributeError, match="frozen"):
        params.width = 4


@pytest.mark.holds("config-2")
def test_typed_params_are_closed_and_say_what_is_wrong() -> None:
    class Mine(Params):
        width: int = 3

    assert Mine(**config(params={"width": 5}).params).width == 5
    with pytest.raises(ConfigError, match="params: unknown key 'widht': did you mean 'width'"):
        Mine(widht=3)
    with pytest.raises(ConfigError, match=r"params\.width: wanted a whole number, found 'x'"):
        Mine(width="x")


# as a flow's parameter, as a package -------------------------------------------
def test_the_schema_is_plain_json_and_describes_every_field() -> None:
    schema = Config.model_json_schema()
    json.dumps(schema, allow_nan=False)
    assert all(field.get("description") for field in schema["properties"].values())
    aside = {name for name, field in schema["properties"].items() if field.get("identity") is False}
    assert {"project_root", "run_name", "log_interval"} <= aside and not {"seed", "params", "optim"} & aside
    assert schema["additionalProperties"] is False


def test_the_package_offers_its_names_and_refuses_others() -> None:
    assert danling_core.Config is Config and danling_core.errors.ConfigError is ConfigError
    assert set(danling_core.__all__) <= set(dir(danling_core))
    with pytest.raises(AttributeError, match="no attribute 'Confg'"):
        _ = danling_core.Confg


def test_a_runner_is_looked_for_beside_the_config_and_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "both.py").touch()
    (there / "only.py").touch()
    (here / "mine.py").touch()
    monkeypatch.chdir(here)

    def runner_of(name: str, folder: Path) -> str | None:
        (folder / "run.yaml").write_text(f"runner: {name}.py:Mine\nepoch_end: 1\n")
        return Config.load(folder / "run.yaml").runner

    assert runner_of("only", there) == f"{there}/only.py:Mine"
    assert runner_of("both", there) == f"{there}/both.py:Mine"
    assert runner_of("mine", there) == "mine.py:Mine"
    assert runner_of("both", here) == "both.py:Mine"


def test_a_form_begins_with_what_people_change_first() -> None:
    properties = list(Config.model_json_schema()["properties"])
    assert properties[:5] == ["experiment_name", "run_name", "runner", "project_root", "seed"]
    assert {"dataloader", "optim", "scheduler", "params", "nproc_per_node"} <= set(properties[:11])
    assert sorted(properties) == sorted(Config.model_fields)


# names of other frameworks ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_of_another_framework_is_answered_with_ours(name: str) -> None:
    """What the message says to use is a key that there is."""
    assert name not in Config.model_fields
    with pytest.raises(ConfigError) as raised:
        Config.from_dict({"epoch_end": 1, name: 3})
    meant = NAMES[name]
    if isinstance(meant, str):
        assert str(raised.value) == f"unknown key {name!r}: {meant}"
        return
    assert f"did you mean '{meant[0]}'" in str(raised.value)
    for key in meant:
        section, _, rest = key.partition("=")[0].partition(".")
        assert section in Config.model_fields, key
        if rest and section not in ("limit_batches", "dataloader"):
            known: dict[str, Any] = {
                "optim": OptimConfig,
                "scheduler": SchedulerConfig,
                "average": AverageConfig,
            }
            assert rest in known[section].model_fields or (section, rest) == ("scheduler", "total_steps")

"""Dotted overrides: how they are read, applied, swept and named."""

from __future__ import annotations

from typing import Any

import pytest

from danling_core.config import Config
from danling_core.config.overrides import apply, grid, parse_override, parse_sweep, run_names
from danling_core.errors import ConfigError


@pytest.mark.holds("config-3")
@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.b=1e-3", ("a", "b"), 0.001),
        ("seed=0", ("seed",), 0),
        ("seed = 7 ", ("seed",), 7),
        ("a=-0.0", ("a",), -0.0),
        ("a=true", ("a",), True),
        ("a=yes", ("a",), "yes"),
        ("a=null", ("a",), None),
        ("a=", ("a",), None),
        ("a='1'", ("a",), "1"),
        ('a="x: y"', ("a",), "x: y"),
        ("a=x: y", ("a",), "x: y"),
        ("a=#fff", ("a",), "#fff"),
        ("a=x #y", ("a",), "x #y"),
        ("a=b=c", ("a",), "b=c"),
        ("a=s3://bucket/x", ("a",), "s3://bucket/x"),
        ("a=*x", ("a",), "*x"),
        ("a=<<", ("a",), "<<"),
        ("a=- 1", ("a",), "- 1"),
        ("a=[1, 2e-3, x]", ("a",), [1, 0.002, "x"]),
        ("a={lr: 1e-3}", ("a",), {"lr": 0.001}),
        ("a=数据", ("a",), "数据"),
    ],
)
def test_a_value_is_read_as_yaml_reads_one(text: str, path: tuple[str, ...], value: Any) -> None:
    assert repr(parse_override(text)) == repr((path, value))


@pytest.mark.parametrize(
    "text", ["seed", "=1", "a..b=1", ".a=1", "a.=1", "a=[1", "a={x: 1, x: 2}", "a=" + "9" * 5000]
)
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_override(text)


def test_overrides_are_applied_in_order_to_a_copy() -> None:
    values = {"optim": {"name": "adamw", "lr": 0.1}, "seed": 0}
    assert apply(values, ["optim.lr=1", "optim.lr=2", "params.a.b=3"]) == {
        "optim": {"name": "adamw", "lr": 2},
        "seed": 0,
        "params": {"a": {"b": 3}},
    }
    assert values == {"optim": {"name": "adamw", "lr": 0.1}, "seed": 0}


def test_mappings_are_merged_and_anything_else_replaces() -> None:
    values = {"params": {"a": 1, "b": {"c": 2}, "d": [1, 2]}, "optim": None}
    changed = apply(values, {"params": {"b": {"e": 3}, "d": [4]}, "optim": {"name": "sgd"}, "params.a": None})
    assert changed == {"params": {"a": None, "b": {"c": 2, "e": 3}, "d": [4]}, "optim": {"name": "sgd"}}


def test_a_key_through_a_value_is_refused_without_repeating_the_value() -> None:
    with pytest.raises(ConfigError, match="'params.a' is not a section") as caught:
        apply({"params": {"a": "hunter2"}}, ["params.a.b=1"])
    assert "hunter2" not in str(caught.value)


def test_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="wanted a list"):
        apply({}, "seed=1")


def test_a_config_is_overridden_into_a_new_one() -> None:
    first = Config(epoch_end=3, params={"lr": 0.1})
    second = first.override(
        ["params.lr=0.01", "optim.name=sgd", "optim.lr=1e-3", "dataloader.val.batch_size=4"]
    )
    assert (first.params, second.params) == ({"lr": 0.1}, {"lr": 0.01})
    assert second.optim is not None and second.optim.lr == 0.001
    assert second.dataloader.for_split("val", training=False).batch_size == 4
    with pytest.raises(ConfigError, match="did you mean 'dataloader'"):
        first.override(["dataloadr.batch_size=4"])


def test_another_end_needs_the_first_set_to_null() -> None:
    with pytest.raises(ConfigError, match="set the other to null"):
        Config(epoch_end=3).override(["step_end=5"])
    assert Config(epoch_end=3).override(["step_end=5", "epoch_end=null"]).step_end == 5


def test_a_grid_varies_its_last_key_fastest() -> None:
    assert grid({"optim.lr": [0.1, 0.2], "seed": [0, 1]}) == [
        {"optim.lr": 0.1, "seed": 0},
        {"optim.lr": 0.1, "seed": 1},
        {"optim.lr": 0.2, "seed": 0},
        {"optim.lr": 0.2, "seed": 1},
    ]
    assert grid({"optim": {"lr": [0.1]}}) == [{"optim.lr": 0.1}]
    assert grid({}) == [{}]


@pytest.mark.parametrize("sweep", [{"seed": 1}, {"seed": []}, {"seed": "01"}, {"a": {"b": [1]}, "a.b": [2]}])
def test_a_grid_without_lists_is_refused(sweep: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        grid(sweep)


def test_names_say_what_varies() -> None:
    assert run_names("base", grid({"optim.lr": [1e-3, 1e-5], "seed": [0]})) == [
        "base-lr=0.001-seed=0",
        "base-lr=1e-05-seed=0",
    ]
    assert run_names("base", [{}]) == ["base"]
    assert run_names("b", [{"optim.name": "a", "scheduler.name": "c"}]) == ["b-optim.name=a-scheduler.name=c"]
    assert run_names("b", [{"run_name": "mine", "seed": 1}, {"seed": 2}]) == ["mine", "b-seed=2"]


def test_names_are_unique_short_and_fit_for_folders() -> None:
    values = ["a/b", "a:b", "é数", "x" * 300, "x" * 301, [1, {"a": 2}], None, True, ".."]
    names = run_names("base", grid({"params.v": values}))
    assert len(set(names)) == len(values)
    for name in names:
        Config(epoch_end=1, run_name=name)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ("1e-3,3e-3", [1e-3, 3e-3]),
        ("a: b,c", ["a: b", "c"]),
        ("&x,*y,!z,@w,%v", ["&x", "*y", "!z", "@w", "%v"]),
        ("#fff,#000", ["#fff", "#000"]),
        ("yes,true,null,", ["yes", True, None]),
        ("[1,2],[3]", [[1, 2], [3]]),
        ("{a: 1, b: [2, 3]},{}", [{"a": 1, "b": [2, 3]}, {}]),
        ("'a,b',\"c,d\",it's", ["a,b", "c,d", "it's"]),
        ("['a]',b],c", [["a]", "b"], "c"]),
        ("x[0],y", ["x[0]", "y"]),
    ],
)
def test_the_words_of_a_sweep_are_read_as_overrides_are(values: str, wanted: list[Any]) -> None:
    assert parse_sweep([f"params.x={values}"]) == {"params.x": wanted}
    for value in wanted:
        if isinstance(value, str) and "," not in value:
            assert parse_override(f"x={value}")[1] == value


@pytest.mark.parametrize("values", ["", ",", "1,,2"])
def test_a_sweep_without_a_value_is_refused(values: str) -> None:
    with pytest.raises(ConfigError, match="wanted a value"):
        parse_sweep([f"seed={values}"])

"""The disk and the stores that are simulated for the explorer answer as real ones do."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from danling_core.storage.failures import already_exists
from danling_core.storage.folder import Folder
from danling_core.storage.local import LocalBackend, make_folder
from danling_core.storage.remote import RemoteBackend
from danling_core.storage.settings import current
from tests.explorer.disk import MODELS, Disk, Image, Operation, crashes, replayed
from tests.explorer.recorder import Recorder
from tests.explorer.store import Kind, SimulatedStore

PATHS = ("a", "b", "folder/x", "folder/y", "folder/below/z", "folderless")
FOLDERS = ("", "folder", "folder/below", "nothing")
SEQUENCES, LENGTH = 2, 40

Call = Callable[[Any, str], Any]


def an_operation(chance: random.Random, scratch: Path) -> tuple[str, Call]:
    """Return an operation on a `Backend` below a root, and what it is called."""
    path, folder = chance.choice(PATHS), chance.choice(FOLDERS)
    data = bytes(chance.choices(range(256), k=chance.choice([0, 1, 100])))
    local = scratch / "local"

    def put(store: Any, root: str) -> None:
        local.write_bytes(data)
        store.put(str(local), f"{root}/{path}")

    def get(store: Any, root: str) -> bytes:
        store.get(f"{root}/{path}", str(local))
        return local.read_bytes()

    def tree(store: Any, root: str) -> list[tuple[str, int]]:
        return [(entry.path, entry.size) for entry in store.tree(_below(root, folder))]

    return chance.choice(
        [
            (f"write {path}", lambda store, root: store.write(f"{root}/{path}", data, True)),
            (f"write {path}", lambda store, root: store.write(f"{root}/{path}", data, False)),
            (f"create {path}", lambda store, root: store.create(f"{root}/{path}", data)),
            (f"put {path}", put),
            (f"read {path}", lambda store, root: store.read(f"{root}/{path}")),
            (f"get {path}", get),
            (f"size {path}", lambda store, root: store.size(f"{root}/{path}")),
            (f"exists {path}", lambda store, root: store.exists(f"{root}/{path}")),
            (f"delete {path}", lambda store, root: store.delete(f"{root}/{path}")),
            (f"delete below {folder}", lambda store, root: store.delete_tree(_below(root, folder))),
            (f"names {folder}", lambda store, root: store.names(_below(root, folder))),
            (f"tree {folder}", tree),
        ]
    )


def _below(root: str, folder: str) -> str:
    return f"{root}/{folder}" if folder else root


def answer(call: Call, store: Any, root: str) -> Any:
    """Return what an operation returns, or which of the errors it raises that callers tell apart."""
    try:
        return call(store, root)
    except FileNotFoundError:
        return "there is none"
    except Exception as error:
        if already_exists(error):
            return "there is one"
        raise


def missing_is_empty(found: Any) -> Any:
    """Take a listing of nothing for an empty one, as callers do: stores differ in it."""
    return [] if found == "there is none" else found


@pytest.mark.parametrize("name", ["s3_root", "rclone_root", "gcs_root"])
def test_a_simulated_store_answers_as_a_real_one(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue(name)
    kind: Kind = "gcs" if name == "gcs_root" else "s3"
    for seed in range(SEQUENCES):
        chance = random.Random(seed)
        simulated, real = SimulatedStore(kind), RemoteBackend(url, current())
        root, told = f"{url}/{seed}", []
        for _ in range(LENGTH):
            what, call = an_operation(chance, tmp_path)
            if name == "rclone_root" and what.startswith("create"):
                continue  # it has no conditional writes
            told.append(what)
            wanted, found = answer(call, simulated, root), answer(call, real, root)
            if what.startswith(("names", "tree", "delete below")):
                wanted, found = missing_is_empty(wanted or []), missing_is_empty(found or [])
            assert wanted == found, f"seed {seed}: {told}"


@pytest.mark.parametrize("seed", range(20))
def test_the_model_of_a_disk_holds_what_a_real_one_does(seed: int, tmp_path: Path) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    root.mkdir()
    scratch.mkdir()
    chance, begin = random.Random(seed), Image()
    for _ in range(3):  # what is there already is part of it
        begin.write_to(str(root))  # an image knows no links
        recorder = Recorder(str(root))
        with recorder.recording():
            for _ in range(LENGTH):
                a_local_operation(chance, str(root), scratch)
        real = Image.read_from(str(root))
        assert replayed(recorder.operations, begin).digest == real.digest
        begin = real


def a_local_operation(chance: random.Random, root: str, scratch: Path) -> None:
    """Do something to a folder of the machine, with what the project uses for it."""
    path = os.path.join(root, chance.choice(PATHS))
    other = os.path.join(root, chance.choice(PATHS))
    kind = chance.choice(["backend", "append", "cut", "rename", "link", "folder", "store"])
    try:
        if kind == "backend":
            answer(an_operation(chance, scratch)[1], LocalBackend(), root)
        elif kind == "append":
            with open(path, chance.choice(["ab", "r+b", "wb"])) as file:
                file.write(chance.randbytes(5))
                file.write(chance.randbytes(3))
        elif kind == "cut":
            os.truncate(path, chance.randrange(4))
        elif kind == "rename":
            os.replace(path, other)
        elif kind == "link":
            os.link(path, other)
        elif kind == "folder":
            make_folder(os.path.join(root, chance.choice(FOLDERS)))
        else:
            Folder(root).delete(chance.choice(PATHS), recursive=True)
    except OSError:
        return  # the operation cannot be done in this state, on the machine as in the model


def test_each_way_to_lose_power_leaves_what_its_rule_says() -> None:
    disk = Disk()
    operations = [
        Operation("folder", "d", 1),
        Operation("sync", "", 0),
        Operation("file", "d/new", 2),
        Operation("write", "d/new", 2, data=b"1234"),
        Operation("sync", "d/new", 2),
        Operation("write", "d/new", 2, at=4, data=b"5678"),
        Operation("rename", "d/new", 2, "d/name"),
    ]
    for operation in operations:
        disk.apply(operation)
    assert disk.image("killed").files == {"d/name": b"12345678"}
    assert disk.image("unsynced lost").files == {"d/name": b"1234"}
    assert disk.image("torn").files == {"d/name": b"123456"}
    assert disk.image("names behind").files == {"d/new": b"12345678"}
    assert disk.image("folders behind").files == {} and disk.image("folders behind").folders == {"d"}
    disk.apply(Operation("sync", "d", 1))
    assert disk.image("folders behind").files == {"d/name": b"1234"}
    assert {crash.model for crash in crashes(operations)} == set(MODELS)

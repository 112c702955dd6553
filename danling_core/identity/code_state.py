"""State of the code around a file, by git: the commit, and a hash of the difference from it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from danling_core.errors import ConfigError

_TIMEOUT_SECONDS = 60.0
_NAMES_AT_ONCE = 500  # on one command line
# The user's settings must not change the hash, and reading must not change the repository.
_SETTINGS = [
    "safe.directory=*",
    "core.fsmonitor=false",
    "core.quotePath=true",
    "diff.autoRefreshIndex=false",
    "diff.suppressBlankEmpty=false",
    "diff.interHunkContext=0",
    f"diff.orderFile={os.devnull}",
]
_GIT = ["git", "--no-pager", *(word for setting in _SETTINGS for word in ("-c", setting))]
_DIFF = [
    *("diff", "HEAD", "--binary", "--full-index", "--unified=3", "--diff-algorithm=myers"),
    *(
        "--no-ext-diff",
        "--no-textconv",
        "--no-color",
        "--no-renames",
        "--no-relative",
        "--no-indent-heuristic",
    ),
    *("--src-prefix=a/", "--dst-prefix=b/", "--submodule=short", "--ignore-submodules=dirty"),
]
_KEPT_VARIABLES = (
    "GIT_CONFIG",
    "GIT_CEILING_DIRECTORIES",
    "GIT_DISCOVERY_ACROSS_FILESYSTEM",
    "GIT_EXEC_PATH",
)


@dataclass(frozen=True)
class CodeState:
    """A commit (40 or 64 hex digits) and the sha256 of what differs from it; None when nothing does."""

    commit: str
    difference: str | None


def code_state(source: Path, exclude: Sequence[Path] = (), imported: Sequence[Path] = ()) -> CodeState | None:
    """Return the state of the git repository that holds `source`.

    None outside a repository, in one without a commit, or where there is no git program.

    Args:
        source: absolute, without symbolic links.
        exclude: absolute folders or files that do not count as code. One that contains the source is not
            excluded: nothing would be left.
        imported: absolute files that count wherever they lie, whether git knows them or not.

    Raises:
        ConfigError: git does not answer in time, or fails on a repository it has found.
    """
    top = _ask(source.parent, "rev-parse", "--show-toplevel")
    commit = _ask(source.parent, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if not top or not commit:
        return None
    root = Path(top)
    kept_out = [path for path in exclude if path.is_relative_to(root) and not source.is_relative_to(path)]
    changes = _changes(root, kept_out)
    counted = [path for path in imported if not any(path.is_relative_to(folder) for folder in kept_out)]
    changes += [_part(name, _content(path)) for name, path in _unknown(root, {source, *counted})]
    if not changes:
        return CodeState(commit, None)
    return CodeState(commit, hashlib.sha256(b"".join(changes)).hexdigest())


def _changes(root: Path, exclude: Sequence[Path]) -> list[bytes]:
    """Return a digest for each thing under `root` that differs from its commit, submodules too, in a fixed order."""
    pathspec = [":(top)", *(f":(top,exclude,literal){path.relative_to(root).as_posix()}" for path in exclude)]
    changes = []
    with tempfile.TemporaryFile() as output:
        _run(root, [*_DIFF, "--", *pathspec], output)
        if os.fstat(output.fileno()).st_size:
            output.seek(0)
            changes.append(hashlib.file_digest(output, "sha256").digest())
    for name in _submodules(root, exclude):
        inner = root / os.fsdecode(name)
        changes += [_part(name, change) for change in _changes(inner, _inside(inner, exclude))]
    return changes


def _submodules(root: Path, exclude: Sequence[Path]) -> list[bytes]:
    """Return submodules that are checked out and have a commit. A repository without `.gitmodules` has none."""
    if not (root / ".gitmodules").is_file():
        return []
    staged = (entry.partition(b"\t") for entry in _names(root, ["ls-files", "--stage", "-z"]))
    names = sorted(name for meta, _, name in staged if meta.startswith(b"160000 "))
    folders = {name: root / os.fsdecode(name) for name in names}
    return [
        name
        for name, folder in folders.items()
        if (folder / ".git").exists()
        and not any(folder.is_relative_to(path) for path in exclude)
        and _ask(folder, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    ]


def _unknown(root: Path, files: Iterable[Path]) -> list[tuple[bytes, Path]]:
    """Return the files that git does not track, with a name that is the same on any machine, in a fixed order."""
    inside = {os.fsencode(path.relative_to(root)): path for path in files if path.is_relative_to(root)}
    outside = [
        (b"outside " + os.fsencode(path.name), path) for path in files if not path.is_relative_to(root)
    ]
    names = sorted(inside)
    tracked: set[bytes] = set()
    for begin in range(0, len(names), _NAMES_AT_ONCE):
        wanted = [f":(top,literal){os.fsdecode(name)}" for name in names[begin : begin + _NAMES_AT_ONCE]]
        tracked.update(_names(root, ["ls-files", "--recurse-submodules", "-z", "--", *wanted]))
    return sorted(((name, path) for name, path in inside.items() if name not in tracked)) + sorted(outside)


def _inside(root: Path, paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if path.is_relative_to(root) and path != root]


def _content(path: Path) -> bytes:
    """Return a file's bytes; a link's target, so that a link out of the tree is not followed."""
    try:
        if path.is_symlink():
            return b"link " + os.fsencode(os.readlink(path))
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:  # deleted since git listed it
        return b""


def _part(name: bytes, content: bytes) -> bytes:
    return hashlib.sha256(b"%d %b %b" % (len(name), name, hashlib.sha256(content).digest())).digest()


def _names(folder: Path, arguments: Sequence[str]) -> list[bytes]:
    with tempfile.TemporaryFile() as output:
        _run(folder, arguments, output)
        output.seek(0)
        return [name for name in output.read().split(b"\0") if name]


def git_output(folder: Path, *arguments: str) -> bytes | None:
    """Return the output of git in a folder, whatever the user's settings; None if it fails or is not installed.

    Raises:
        ConfigError: it does not answer in time.
    """
    with tempfile.TemporaryFile() as output:
        try:
            code, _ = _call(folder, arguments, output)
        except FileNotFoundError:
            return None
        output.seek(0)
        return output.read() if code == 0 else None


def _ask(folder: Path, *arguments: str) -> str | None:
    """Return a one-line answer; None when git says no, or is not installed."""
    answer = git_output(folder, *arguments)
    return None if answer is None else os.fsdecode(answer).removesuffix("\n")


def _run(folder: Path, arguments: Sequence[str], output: IO[bytes]) -> None:
    code, error = _call(folder, arguments, output)
    if code != 0:
        raise ConfigError(
            f"git {arguments[0]} failed in {folder} ({error or f'exit {code}'}): "
            f"the code cannot be identified; mend the repository or state experiment_id"
        )


def _call(folder: Path, arguments: Sequence[str], output: IO[bytes]) -> tuple[int, str]:
    """Exit code and last line of the errors. FileNotFoundError when there is no git program."""
    kept = {name: value for name, value in os.environ.items() if _is_kept(name)}
    environment = {**kept, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            [*_GIT, "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"git {arguments[0]} in {folder} gave no answer in {_TIMEOUT_SECONDS:g} s: state experiment_id"
        ) from error
    return done.returncode, done.stderr.decode(errors="replace").strip().rpartition("\n")[2]


def _is_kept(name: str) -> bool:
    """Inside a git hook, GIT_DIR and GIT_INDEX_FILE point at another repository or index."""
    return not name.startswith("GIT_") or name.startswith(_KEPT_VARIABLES)

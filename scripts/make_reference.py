"""Writes docs/reference.md from the docstrings: `python scripts/make_reference.py [--check]`."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"
SOURCES = {
    "Attributes and properties": ("danling_core/runner/base.py", "RunnerBase"),
    "Methods: the run": ("danling_core/runner/base_runner.py", "BaseRunner"),
    "Methods: PyTorch": ("danling_core/runner/torch_runner.py", "TorchRunner"),
    "Config": ("danling_core/config/config.py", "Config"),
    "Config: dataloader": ("danling_core/config/sections.py", "DataLoaderConfig"),
    "Config: one split of dataloader": ("danling_core/config/sections.py", "SplitOptions"),
    "Config: optim": ("danling_core/config/sections.py", "OptimConfig"),
    "Config: scheduler": ("danling_core/config/sections.py", "SchedulerConfig"),
    "Config: average": ("danling_core/config/sections.py", "AverageConfig"),
    "Config: pretrained": ("danling_core/config/sections.py", "PretrainedConfig"),
    "Config: profile": ("danling_core/config/sections.py", "ProfileConfig"),
    "Config: compile": ("danling_core/config/sections.py", "CompileConfig"),
    "Config: callbacks": ("danling_core/config/sections.py", "CallbackConfig"),
    "Callback": ("danling_core/callbacks/callback.py", "Callback"),
    "Experiment files": ("danling_core/config/sweep.py", "ExperimentSpec"),
    "Group files": ("danling_core/config/sweep.py", "GroupSpec"),
    "MetricGroup": ("danling_core/metrics/group.py", "MetricGroup"),
    "Accuracy": ("danling_core/metrics/meters.py", "Accuracy"),
}
_WITH_FIELDS = ("Config", "Options", "Spec")
# Of these the classes' own docstrings are for those who write them.
_KNOWN = ("Attributes and properties", "Methods: the run", "Methods: PyTorch")
_SECTION = re.compile(r"^    # (.+?) -{5,}$")
_HEAD = """# Reference

Made from the docstrings by `python scripts/make_reference.py`; do not edit. `danling_core.Runner` has all of it.
*Collective*: every rank calls it.
"""


class Entry(NamedTuple):
    """One line of the page."""

    line: int
    name: str
    shown: str
    meaning: str


def page() -> str:
    """Return the whole page as Markdown."""
    parts = [_HEAD]
    for title, (path, name) in SOURCES.items():
        text = (ROOT / path).read_text()
        parts.append(f"\n## {title}\n")
        if title not in _KNOWN:
            parts.append(f"{_doc(text, name)}\n")
        parts += _tables(text, entries(text, name))
    return "\n".join(parts) + "\n"


def _doc(text: str, class_name: str) -> str:
    """Return the class's signature and the first paragraph of its docstring."""
    (found,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == class_name]
    made = next((m for m in found.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"), None)
    call = "" if made is None else f"`{_signature(made).replace('__init__', class_name)}`: "
    return call + _first(ast.get_docstring(found) or "")


def entries(text: str, class_name: str) -> list[Entry]:
    """Return the declarations of the class of this name, in its order."""
    tree = ast.parse(text)
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return list(_fields(found) if class_name.endswith(_WITH_FIELDS) else _members(found))


def _members(node: ast.ClassDef) -> Iterator[Entry]:
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.value, ast.Call):
            assert isinstance(item.target, ast.Name) and isinstance(item.annotation, ast.Subscript)
            name, meaning = item.target.id, ast.literal_eval(item.value.args[1])
            yield Entry(item.lineno, name, f"{name}: {ast.unparse(item.annotation.slice)}", meaning)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _is_public(item):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), item.target.id
            name = item.target.id
            yield Entry(
                item.lineno, name, f"{name}: {ast.unparse(item.annotation)}", _first(after.value.value)
            )
        elif isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            doc = ast.get_docstring(item)
            if doc:  # an overridden method is documented at its base
                yield Entry(item.lineno, item.name, _signature(item), _first(doc))


def _is_public(item: ast.AnnAssign) -> bool:
    return isinstance(item.target, ast.Name) and not item.target.id.startswith("_")


def _fields(node: ast.ClassDef) -> Iterator[Entry]:
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.value, ast.Call):
            continue
        assert isinstance(item.target, ast.Name)
        name, call = item.target.id, item.value
        stated = [k.value for k in call.keywords if k.arg == "description"] or call.args[1:2]
        default = f" = {ast.unparse(call.args[0])}" if call.args else ""
        shown = f"{name}: {ast.unparse(item.annotation)}{default}"
        yield Entry(item.lineno, name, shown, str(ast.literal_eval(stated[0])))


def _signature(item: ast.FunctionDef) -> str:
    decorators = [ast.unparse(decorator) for decorator in item.decorator_list]
    if "property" in decorators:
        return f"{item.name}: {ast.unparse(item.returns)}" if item.returns else item.name
    arguments = ast.parse(ast.unparse(item.args).join(("def f(", "): ..."))).body[0]
    assert isinstance(arguments, ast.FunctionDef)
    arguments.args.args = [a for a in arguments.args.args if a.arg not in ("self", "cls")]
    for argument in [*arguments.args.args, *arguments.args.kwonlyargs]:
        argument.annotation = None
    return f"{item.name}({ast.unparse(arguments.args)})"


def _first(doc: str) -> str:
    """Return the first paragraph on one line."""
    return " ".join(doc.strip().split("\n\n")[0].split())


def _tables(text: str, found: list[Entry]) -> Iterator[str]:
    sections = [(n, m[1]) for n, line in enumerate(text.splitlines(), 1) if (m := _SECTION.match(line))]
    titles = dict.fromkeys(next((t for n, t in reversed(sections) if n < e.line), "") for e in found)
    for title in titles:
        if title:
            yield f"\n### {title.capitalize()}\n"
        yield "| name | meaning |\n|---|---|"
        for entry in found:
            if next((t for n, t in reversed(sections) if n < entry.line), "") == title:
                yield f"| `{_cell(entry.shown)}` | {_cell(entry.meaning)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(argv: list[str]) -> int:
    """Write the page, or with --check say whether it is up to date; returns the exit status."""
    made = page()
    if "--check" in argv:
        return 0 if PAGE.exists() and PAGE.read_text() == made else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes docs/spec-coverage.md from tests/promises.yaml and the markers of the tests: [--check]."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "spec-coverage.md"
_HEAD = """# What is promised, and the test that holds it

Made by `python scripts/make_coverage.py` from `tests/promises.yaml` and the `@pytest.mark.holds(...)` of the tests; do
not edit. Each promise is a row of the specification; each of its tests fails if it breaks.
"""


def promises() -> dict[str, dict[str, str]]:
    """Return the promises by section: `{section: {id: promise}}`."""
    found: dict[str, dict[str, str]] = yaml.safe_load((ROOT / "tests" / "promises.yaml").read_text())
    return found


def holders() -> dict[str, list[str]]:
    """Return the tests that hold each promise, as `path::test`, by its id."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if ast.unparse(decorator).startswith("pytest.mark.holds("):
                    assert isinstance(decorator, ast.Call) and isinstance(node, ast.FunctionDef)
                    name = f"{path.relative_to(ROOT / 'tests')}::{node.name}"
                    for argument in decorator.args:
                        found[ast.literal_eval(argument)].append(name)
    return found


def page() -> str:
    """Return the whole page as Markdown."""
    tests, parts = holders(), [_HEAD]
    for section, rows in promises().items():
        parts += [f"\n## {section}\n", "| promise | tests |\n|---|---|"]
        for name, promise in rows.items():
            held = "<br>".join(f"`{test}`" for test in tests.get(name, ()))
            cell = promise.replace("|", "\\|")
            parts.append(f"| {cell} | {held} |")
    return "\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    """Write the page, or with --check say whether it is up to date; return the exit status."""
    made = page()
    if "--check" in argv:
        return 0 if PAGE.exists() and PAGE.read_text() == made else 1
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

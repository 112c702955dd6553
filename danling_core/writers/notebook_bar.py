"""A progress bar in a notebook's cell: one output, which is drawn anew."""

from __future__ import annotations

import html
import sys
from typing import Any


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


class NotebookBar:
    """Draws what `ProgressBar` says, in the cell that runs. It has the methods of rich's bar that are used there."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._fields: dict[str, Any] = {"completed": 0.0, "status": "", "left": ""}
        self._handle: Any = None

    def update(self, task: Any, **fields: Any) -> None:
        """Take over what is to be shown."""
        self._fields.update(fields)

    def refresh(self) -> None:
        """Draw it."""
        from IPython.display import display

        share, status, left = (self._fields[name] for name in ("completed", "status", "left"))
        text = " ".join(filter(None, (self._description, f"{share:4.0%}", status, left)))
        shown = {
            "text/plain": text,
            "text/html": f'<progress value="{share:.4f}" max="1" style="width:40%"></progress> '
            f"<code>{html.escape(text)}</code>",
        }
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self.refresh()

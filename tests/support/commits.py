"""Earlier versions of the repository, checked out next to the working tree."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def resolve_commit(name: str) -> str:
    """Return the full hash of the commit that a name, tag or abbreviated hash denotes."""
    return _git("rev-parse", "--verify", f"{name}^{{commit}}")


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check out a commit in a temporary worktree and yield its root; remove it on exit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

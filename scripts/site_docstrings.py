"""Extension of Griffe that reads the docstrings of this project (see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, GriffeLoader, Object


class Examples(Extension):
    """Read the section `Example` as `Examples`, the only title that Griffe knows."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **kwargs: Any) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

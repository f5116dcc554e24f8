"""Run the training script of HtFLlib with a given model family, for `htfllib_parity`.

    python -m benchmarks.science.htfllib_reference SYSTEM FAMILY [option of its main.py …]

`SYSTEM` is the folder `system` of a checkout of HtFLlib, whose files are not changed. The working
directory is a folder next to `dataset`, which contains the split. The family `digits` of
`htfllib_models` replaces the models of the family that `main.py` selects. All other families are
those of HtFLlib.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from benchmarks.science.htfllib_models import DIGITS_IN_HTFLLIB
from benchmarks.speed.htfllib_rounds import prepare_imports


def use_models(models: list[str]) -> None:
    """Replace the models of the selected family with other models.

    Args:
        models: The models, in the notation of HtFLlib's `main.py`.
    """
    from flcore.servers.serverbase import Server

    create = Server.__init__

    def create_with_models(server: Any, options: Any, times: int) -> None:
        options.models = models
        create(server, options, times)

    Server.__init__ = create_with_models


def main(system: str, family: str, options: list[str]) -> None:
    """Run `main.py` of HtFLlib.

    Args:
        system: The folder `system` of a checkout of HtFLlib.
        family: Name of the model family.
        options: Further options of `main.py`.
    """
    prepare_imports(system)
    selected = family
    if family == "digits":
        selected = "HtFE-img-2"
        use_models(list(DIGITS_IN_HTFLLIB))
    sys.argv = ["main.py", "-m", selected, *options]
    runpy.run_path(f"{system}/main.py", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

"""`hetero-fl federate`: what `train` does, by a real federation on this machine."""

from __future__ import annotations

import argparse

from hetero_fl.beside import Beside
from hetero_fl.cli.asked import check_run, options_of_run, permission_of, print_finished, say_of

NURSERY = "hetero_fl.experiment.deployment.nursery"


def setup(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `train`."""
    options_of_run(parser)
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    permission = permission_of(options)
    if (source := check_run(options, permission)) is None:
        return 0
    nursery = Beside(NURSERY)  # before torch is loaded here: the nodes load it in the same time
    with nursery:
        from hetero_fl.experiment.deployment.local import federate

        finished = federate(
            source,
            out=options.out,
            resume=options.resume,
            overrides=options.overrides,
            quiet=options.quiet,
            nursery=nursery,
            allow_code=permission,
        )
    print_finished(finished, say_of(options))
    return 0

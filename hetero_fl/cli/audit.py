"""`hetero-fl audit`: what a finished run gives away."""

from __future__ import annotations

import argparse
from pathlib import Path

from hetero_fl.cli.asked import option_of_code, permission_of, say_of


def setup(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a finished run")
    parser.add_argument("--clients", metavar="ID,…", help="whose rows are sought (default: the first two clients)")
    parser.add_argument(
        "--attack",
        default="both",
        metavar="NAME",
        help="membership, inversion or both (default), as far as they can be tried",
    )
    parser.add_argument(
        "--shadows",
        type=int,
        default=4,
        help="shadow runs, even (default: 4); 0: the attack by the loss alone, at once",
    )
    parser.add_argument("--images", type=int, default=3, help="steps to invert, of each client (default: 3)")
    parser.add_argument("--batch", type=int, default=1, help="images in a step, 1 to 4 (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the audit's own draws (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for figures, picture and report (default: RUN/audit)")
    option_of_code(parser)
    parser.set_defaults(carry_out=carry_out)


def carry_out(options: argparse.Namespace) -> int:
    """Parse, call, print."""
    from rich.console import Console
    from rich.table import Table

    from hetero_fl.experiment import audit
    from hetero_fl.reporting.auditing import INVERSION, MEMBERSHIP, inversion_rows, membership_rows

    out = options.out or options.run / "audit"
    content = audit(
        options.run,
        clients=[name.strip() for name in options.clients.split(",") if name.strip()] if options.clients else None,
        attack=options.attack,
        shadows=options.shadows,
        images=options.images,
        batch=options.batch,
        seed=options.seed,
        out=out,
        say=say_of(options),
        allow_code=permission_of(options),
    )
    for title, columns, rows in (
        ("membership inference", MEMBERSHIP, membership_rows(content)),
        ("gradient inversion", INVERSION, inversion_rows(content)),
    ):
        if rows:
            table = Table(*columns, title=title)
            for row in rows:
                table.add_row(*row)
            Console().print(table)
    for note in content["notes"]:
        say_of(options)(note)
    say_of(options)(f"report: {out / 'audit.html'}")
    print(out)
    return 0

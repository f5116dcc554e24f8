"""`hetero-fl server` and `hetero-fl node`: the two sides of a federation, for machines of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

from hetero_fl.cli.asked import check_run, option_of_code, options_of_run, permission_of, print_finished, say_of
from hetero_fl.errors import UserError

MAKES = "`hetero-fl certificates` makes one"


def setup_server(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `train`, and the server's own file."""
    options_of_run(parser)
    parser.add_argument("--server", type=Path, metavar="FILE", help=f"where it listens, who may come; {MAKES}")
    parser.set_defaults(carry_out=_serve)


def _serve(options: argparse.Namespace) -> int:
    permission = permission_of(options)
    if (source := check_run(options, permission)) is None:
        return 0
    if options.server is None:
        raise UserError(f"--server is missing: name a file ({MAKES})")
    from hetero_fl.experiment.deployment.presiding import preside

    finished = preside(
        source,
        options.server,
        out=options.out,
        resume=options.resume,
        overrides=options.overrides,
        allow_code=permission,
        quiet=options.quiet,
    )
    print_finished(finished, say_of(options))
    return 0


def setup_node(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--site", type=Path, metavar="FILE", help=f"this site's own file; {MAKES}")
    parser.add_argument("--once", action="store_true", help="end when a run is over (default: wait for the next one)")
    parser.add_argument(
        "--audit", type=Path, metavar="FILE", help="print a node's log, audit.jsonl in its folder, and check it"
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="with --audit: the node's public key (….pub), which shows who wrote the log",
    )
    parser.add_argument(
        "--head", metavar="N:HASH", help="with --audit: what was noted of the log earlier, which must still be in it"
    )
    option_of_code(parser)
    parser.set_defaults(carry_out=_attend)


def _attend(options: argparse.Namespace) -> int:
    if options.audit is not None:
        return _audit(options.audit, options.key, options.head)
    if options.site is None:
        raise UserError(f"--site is missing: name a file ({MAKES}); or --audit")
    from hetero_fl.experiment.deployment.attending import attend

    return 130 if attend(options.site, options.once, permission_of(options), options.quiet) else 0


def _audit(path: Path, key: Path | None, head: str | None) -> int:
    from hetero_fl.experiment.deployment.audit_log import head_of, shown, totals, verify
    from hetero_fl.experiment.deployment.certificates import load_public_key

    entries = verify(path, None if key is None else load_public_key(key), head)
    print(*shown(entries), sep="\n")
    sums = totals(entries)
    print(f"whole: {len(entries):,} messages; of tasks {sums.down:,} bytes came, {sums.up:,} went")
    print(f"head: {head_of(path)}")
    if key is None:
        print("signatures were not checked, so lines may have been appended; --key names the site's public key")
    return 0


def setup_certificates(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="a new folder: one for the server in it, one for each site"
    )
    parser.add_argument(
        "--host", action="append", required=True, metavar="NAME", help="name or address of the server (several: again)"
    )
    parser.add_argument("--clients", required=True, metavar="A,B,…", help="the clients of the configuration")
    parser.set_defaults(carry_out=_equip)


def _equip(options: argparse.Namespace) -> int:
    from hetero_fl.experiment.deployment.equipment import equip

    for path in equip(options.folder, options.host, [name.strip() for name in options.clients.split(",")]):
        print(path)
    return 0

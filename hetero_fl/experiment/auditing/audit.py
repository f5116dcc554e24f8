"""Privacy audit of a finished run by membership inference and gradient inversion."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hetero_fl.data import Dataset
from hetero_fl.experiment.auditing.inversion import Protect, attack_uploads
from hetero_fl.experiment.auditing.membership import attack_membership
from hetero_fl.experiment.preparation import prepare_again
from hetero_fl.reporting.formatting import algorithm_name, format_duration
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run import Run
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.summary import PRIVACY_UNITS
from hetero_fl.utils.code_permission import AllowCode
from hetero_fl.utils.errors import ArgumentError, suggest_or_list
from hetero_fl.utils.serialization import make_folder
from hetero_fl.utils.text import pluralize

# Defaults: number of attacked clients, of shadow runs, and of inverted training steps.
CLIENTS = 2
SHADOWS = 4
IMAGES = 3
Attack = Literal["membership", "inversion", "both"]
Json = dict[str, Any]
Table = list[tuple[str, ...]]
# Words of the tables for values in `audit.json`.
ATTACKS = {"loss": "loss", "lira": "LiRA"}
WAYS = {"blind": "none (mean image)"}
LABELS = {"read": "recovered", "misread": "wrong", "known": "assumed known", None: ""}
# PSNR in dB from which a reconstruction counts as exact.
EXACT = 99.0


def audit(
    run: Run | str | Path,
    *,
    clients: Sequence[str] | None = None,
    attack: Attack = "both",
    shadows: int = SHADOWS,
    images: int = IMAGES,
    seed: int = 0,
    protect: Protect | None = None,
    dataset: Dataset | None = None,
    out: str | Path | None = None,
    log: Callable[[str], None] = lambda _line: None,
    allow_code: AllowCode = False,
) -> Json:
    """Attack a finished run and report what its models and uploads reveal about training rows.

    The results are written to `audit.json` and, with the reconstructed images, to `audit.html`.

    Args:
        run: A finished run or its directory.
        clients: Ids of the clients to attack. If None or empty, the first two clients are attacked.
        attack: "membership", "inversion" or "both". With "both", an attack that does not apply is
            skipped with a note.
        shadows: Number of shadow runs, which repeat the run with different training rows. The
            number must be even and >= 4, or 0. If 0, membership is inferred from the loss alone.
        images: Number of training steps to invert for each client, each on one image.
        seed: Seed of the audit.
        protect: Function that modifies an update before the attacker observes the update. The
            update contains the sent minus the received tensors, keyed by name. The results are
            reported as an additional variant.
        dataset: The data set in memory that the run was trained on. If None, the configured data
            is loaded.
        out: The folder to write to. Default: `audit` in the run directory.
        log: Function that is called with each line of progress.
        allow_code: Whether code that the files of the run refer to may be executed.

    Returns:
        The content of `audit.json`.

    Raises:
        UserError: If the run is not finished, if the data of the run has changed, if an argument is
            invalid, or if inversion is the only requested attack and does not apply.

    Example:
        >>> from tempfile import mkdtemp
        >>> import hetero_fl
        >>> config = {"data": {"name": "digits"}, "algorithm": {"name": "fedavg"}, "rounds": 1}
        >>> overrides = ["clients.count=2", "output.plots=false", "output.report=false"]
        >>> run = hetero_fl.run(config, out=mkdtemp(), overrides=overrides)
        >>> found = hetero_fl.audit(run, clients=["client_1"], attack="membership", shadows=0)
        >>> [(row["client"], row["attack"]) for row in found["membership"]]
        [('client_1', 'loss')]
    """
    started = time.perf_counter()
    run = Run.open(run, allow_code)
    _check_arguments(attack, shadows, images)
    chosen = _chosen_clients(run, clients)
    run.load_models()
    prepared = prepare_again(run, dataset)
    folder = Path(out) if out is not None else run.path / "audit"
    make_folder(folder)
    summary = run.summary
    notes: list[str] = []
    content: Json = {
        "run": summary["name"],
        "algorithm": summary["algorithm"],
        "data": summary["data"]["name"],
        "seed": seed,
        "rounds": summary["rounds_completed"],
        "privacy": summary.get("privacy"),
        "clients": chosen,
        "shadows": shadows,
        "membership": [],
        "inversion": [],
        "notes": notes,
    }
    pictures: list[Json] = []
    if attack != "inversion":
        content["membership"] = attack_membership(
            run, prepared, chosen, shadows=shadows, seed=seed, notes=notes, log=log
        )
    if attack != "membership":
        content["inversion"], pictures = attack_uploads(
            prepared,
            chosen,
            images=images,
            seed=seed,
            protect=protect,
            dataset=dataset,
            notes=notes,
            log=log,
        )
        if not pictures and attack == "inversion":
            raise ArgumentError(f"attack: inversion does not apply: {notes[0]}")
    content["seconds"] = time.perf_counter() - started
    directory = RunDirectory(folder)
    directory.write_json("audit.json", content)
    directory.write_text("audit.html", audit_page(content, pictures))
    return content


def _check_arguments(attack: str, shadows: int, images: int) -> None:
    attacks = ["membership", "inversion", "both"]
    if attack not in attacks:
        raise ArgumentError(f"attack: unknown attack '{attack}'{suggest_or_list(attack, attacks)}")
    if shadows and (shadows < 4 or shadows % 2):
        raise ArgumentError(
            f"shadows: must be an even number >= 4, or 0 for the loss attack only, got {shadows}"
        )
    if images < 1:
        raise ArgumentError(f"images: must be >= 1, got {images}")


def _chosen_clients(run: Run, clients: Sequence[str] | None) -> list[str]:
    ids = [name for name in run.model_names if name != "server"]
    chosen = list(dict.fromkeys(clients)) if clients else ids[:CLIENTS]
    for client_id in chosen:
        if client_id not in ids:
            raise ArgumentError(
                f"clients: {run.path} has no model of '{client_id}'"
                f"{suggest_or_list(client_id, set(ids))}"
            )
    return chosen


def audit_tables(content: Json) -> dict[str, Table]:
    """Format the results of the attacks that were made.

    Args:
        content: The content of `audit.json`.

    Returns:
        The rows of each table, keyed by title. The first row has the names of the columns.
    """
    membership: Table = [
        ("client", "attack", "rows in / out", "AUROC ± s.e.", "TPR at 1% FPR", "verdict")
    ]
    for row in content["membership"]:
        direction = "above chance" if row["auroc"] > 0.5 else "below chance"
        membership.append(
            (
                row["client"],
                ATTACKS[row["attack"]],
                f"{row['members']} / {row['others']}",
                f"{row['auroc']:.3f} ± {row['auroc_se']:.3f}",
                f"{row['hits']:.1%}",
                "at chance" if row["at_chance"] else direction,
            )
        )
    inversion: Table = [("client", "step", "upload", "PSNR", "SSIM", "label")]
    for row in content["inversion"]:
        inversion.append(
            (
                row["client"],
                str(row["step"]),
                WAYS.get(row["way"], row["way"]),
                "exact" if row["psnr"] >= EXACT else f"{row['psnr']:.1f} dB",
                f"{row['ssim']:.2f}",
                LABELS[row.get("label")],
            )
        )
    tables = {"membership inference": membership, "gradient inversion": inversion}
    return {title: table for title, table in tables.items() if len(table) > 1}


def audit_page(content: Json, pictures: Sequence[Json]) -> str:
    """Render the results as an HTML page.

    Args:
        content: The content of `audit.json`.
        pictures: Original and reconstructed images (see `attack_uploads`).
    """
    subtitle = (
        algorithm_name(content["algorithm"]),
        content["data"],
        pluralize(content["rounds"], "round"),
    )
    return render(
        "audit.html",
        title=f"Audit of {content['run']}",
        subtitle=" · ".join(subtitle),
        privacy=content["privacy"],
        whose=PRIVACY_UNITS.get((content["privacy"] or {}).get("unit", ""), ""),
        tables=audit_tables(content),
        pictures=[
            {**each, "images": {way: _encode(image) for way, image in each["images"].items()}}
            for each in pictures
        ],
        notes=content["notes"],
        time=format_duration(content["seconds"]),
    )


def _encode(image: Tensor) -> str:
    """Return an image in [0, 1], `[C, H, W]`, as a PNG in base64. Three channels are colors."""
    # Imported here because most runs are not audited.
    from PIL import Image

    shown = image if len(image) == 3 else image.mean(0).expand(3, -1, -1)
    buffer = BytesIO()
    pixels = (255 * shown.clamp(0, 1)).round().byte()
    Image.fromarray(pixels.movedim(0, -1).numpy()).save(buffer, "png")
    return b64encode(buffer.getvalue()).decode("ascii")

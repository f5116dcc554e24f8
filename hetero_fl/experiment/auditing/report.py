"""Files with the results of an audit: `audit.json`, `audit.png` and `audit.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase

from hetero_fl.reporting.formatting import algorithm_name, format_duration
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.summary import PRIVACY_UNITS
from hetero_fl.utils.text import pluralize

Json = dict[str, Any]
Table = list[tuple[str, ...]]
ATTACKS = {"loss": "loss", "lira": "LiRA"}
COLORS = {"loss": style.GREY, "lira": style.VERMILION}
LABELS = {"read": "recovered", "misread": "wrong", "known": "assumed known"}
# PSNR in dB from which a reconstruction counts as exact.
EXACT = 99.0
# Line styles, one for each client.
LINES = ("-", "--", ":", "-.")
# Largest number of images in a row.
MAX_COLUMNS = 8


def write_audit(folder: Path, content: Json, pictures: list[Json]) -> None:
    """Write `audit.json`, `audit.png` and `audit.html`.

    Args:
        folder: The folder to write to.
        content: The content of `audit.json`.
        pictures: One dictionary for each attacked training step. The keys are `client`, `step`,
            `true` for the original image, and `found` for the reconstructed images, which are
            keyed by variant of the attack. Images are in [0, 1], `[C, H, W]`.
    """
    directory = RunDirectory(folder)
    directory.write_json("audit.json", content)
    with style.plot_style():
        picture = draw_audit(content, pictures)
    (folder / "audit.png").write_bytes(picture)
    subtitle = (
        algorithm_name(content["algorithm"]),
        content["data"],
        pluralize(content["rounds"], "round"),
    )
    text = render(
        "audit.html",
        title=f"Audit of {content['run']}",
        subtitle=" · ".join(subtitle),
        privacy=content["privacy"],
        whose=PRIVACY_UNITS.get((content["privacy"] or {}).get("unit", ""), ""),
        tables=audit_tables(content),
        shadows=content["shadows"],
        picture=style.embed_picture(picture),
        notes=content["notes"],
        time=format_duration(content["seconds"]),
    )
    directory.write_text("audit.html", text)


def audit_tables(content: Json) -> dict[str, Table]:
    """Format the results of the attacks that were made.

    Args:
        content: The content of `audit.json`.

    Returns:
        The rows of each table, keyed by title. The first row has the names of the columns.
    """
    membership = [
        (
            row["client"],
            ATTACKS[row["attack"]],
            f"{row['members']} / {row['others']}",
            f"{row['auroc']:.3f} ± {row['auroc_se']:.3f}",
            f"{row['hits']:.1%}",
            _verdict(row),
        )
        for row in content["membership"]
    ]
    inversion = [
        (
            row["client"],
            str(row["step"]),
            "none (mean image)" if row["way"] == "blind" else row["way"],
            _format_psnr(row["psnr"]),
            f"{row['ssim']:.2f}",
            LABELS.get(row.get("label", ""), ""),
        )
        for row in content["inversion"]
    ]
    tables: dict[str, Table] = {
        "membership inference": [
            ("client", "attack", "rows in / out", "AUROC ± s.e.", "TPR at 1% FPR", "verdict"),
            *membership,
        ],
        "gradient inversion": [
            ("client", "step", "upload", "PSNR", "SSIM", "label"),
            *inversion,
        ],
    }
    return {title: table for title, table in tables.items() if len(table) > 1}


def _verdict(row: Json) -> str:
    if row["at_chance"]:
        return "at chance"
    return "above chance" if row["auroc"] > 0.5 else "below chance"


def _format_psnr(psnr: float) -> str:
    return "exact" if psnr >= EXACT else f"{psnr:.1f} dB"


def draw_audit(content: Json, pictures: list[Json]) -> bytes:
    """Draw ROC curves above original and reconstructed images.

    Args:
        content: The content of `audit.json`.
        pictures: See `write_audit`. At most 8 images are drawn.

    Returns:
        The figure as PNG. Parts without results are omitted.
    """
    heights = []
    if content["membership"]:
        heights.append(2.9)
    if pictures:
        heights.append(0.55 + (len(pictures[0]["found"]) + 1) * 0.98)
    figure = style.figure(sum(heights))
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if content["membership"]:
        _draw_curves(parts[0], content["membership"])
    if pictures:
        _draw_images(parts[-1], pictures[:MAX_COLUMNS], content["inversion"])
    return style.to_png(figure)


def _draw_curves(part: FigureBase, rows: list[Json]) -> None:
    axes = part.subplots()
    clients = list(dict.fromkeys(row["client"] for row in rows))
    for row in rows:
        name = f"{style.shorten(row['client'])}, {ATTACKS[row['attack']]}"
        axes.plot(
            *np.array(row["curve"]).T,
            color=COLORS[row["attack"]],
            linestyle=LINES[clients.index(row["client"]) % len(LINES)],
            linewidth=1.2,
            label=f"{name}: {row['auroc']:.3f} ± {row['auroc_se']:.3f}",
        )
    axes.plot([0, 1], [0, 1], color=style.LIGHT, linewidth=0.9, zorder=0)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="false positive rate",
        ylabel="true positive rate",
        title="Membership inference",
    )
    axes.legend(title="AUROC ± s.e.", loc="center left", bbox_to_anchor=(1.02, 0.5))


def _draw_images(part: FigureBase, pictures: list[Json], rows: list[Json]) -> None:
    ways = list(pictures[0]["found"])
    cells = part.subplots(len(ways) + 1, len(pictures), squeeze=False)
    psnr = {(row["client"], row["step"], row["way"]): row["psnr"] for row in rows}
    for column, picture in enumerate(pictures):
        for line, (way, image) in enumerate(
            {"original": picture["true"], **picture["found"]}.items()
        ):
            axes = cells[line, column]
            style.remove_axes(axes)
            axes.set(xticks=[], yticks=[])
            pixels = image.movedim(0, -1).numpy().clip(0, 1)
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            if line:
                label = _format_psnr(psnr[picture["client"], picture["step"], way])
                axes.set_xlabel(label, labelpad=1, fontsize=7.5)
            if column == 0:
                name = way.replace(" ", "\n", 1)
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        cells[0, column].set_title(
            style.shorten(picture["client"], 12), fontsize=8, fontweight="normal", loc="center"
        )

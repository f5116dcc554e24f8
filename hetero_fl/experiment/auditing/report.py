"""Files with the results of an audit: `audit.json`, `audit.png` and `audit.html`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase
from torch import Tensor

from hetero_fl.reporting.formatting import algorithm_name, format_duration
from hetero_fl.reporting.plots import style
from hetero_fl.reporting.rendering import render
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.reporting.summary import PRIVACY_UNITS
from hetero_fl.utils.text import pluralize

Json = dict[str, Any]
ATTACKS = {"loss": "loss", "lira": "LiRA"}
COLORS = {"loss": style.GREY, "lira": style.VERMILION}
LABELS = {"read": "recovered", "misread": "wrong", "known": "assumed known"}
# PSNR in dB from which a reconstruction counts as exact.
EXACT = 99.0
# Line styles, one for each client.
LINES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dot"}
# Largest number of images in a row.
MAX_COLUMNS = 8
MEMBERSHIP = ("client", "attack", "rows in / out", "AUROC ± s.e.", "TPR at 1% FPR", "")
INVERSION = ("client", "step", "upload", "PSNR (dB)", "SSIM", "label")


def write_audit(folder: Path, content: Json, pictures: list[Json]) -> None:
    """Write `audit.json`, `audit.png` and `audit.html`.

    Args:
        folder: The folder to write to.
        content: The content of `audit.json`.
        pictures: One dictionary for each attacked training step. The keys are `client`, `step`,
            `true` for the original images, and `found` for the reconstructed images, which are
            keyed by variant of the attack. Images are in [0, 1], `[B, C, H, W]`.
    """
    directory = RunDirectory(folder)
    directory.write_json("audit.json", content)
    with style.plot_style():
        picture = draw_audit(content, pictures)
    (folder / "audit.png").write_bytes(picture)
    text = render(
        "audit.html",
        title=f"Audit of {content['run']}",
        subtitle=" · ".join(
            [
                algorithm_name(content["algorithm"]),
                content["data"],
                pluralize(content["rounds"], "round"),
            ]
        ),
        privacy=content["privacy"],
        whose=PRIVACY_UNITS.get((content["privacy"] or {}).get("unit", ""), ""),
        membership=membership_rows(content),
        inversion=inversion_rows(content),
        shadows=content["shadows"],
        picture=style.embed_picture(picture),
        notes=content["notes"],
        time=format_duration(content["seconds"]),
    )
    directory.write_text("audit.html", text)


def membership_rows(content: Json) -> list[list[str]]:
    """Format one table row for each client and attack, with the columns `MEMBERSHIP`."""
    return [
        [
            r["client"],
            ATTACKS[r["attack"]],
            f"{r['members']} / {r['others']}",
            f"{r['auroc']:.3f} ± {r['auroc_se']:.3f}",
            f"{100 * r['hits']:.1f}% ± {100 * r['hits_se']:.1f}%",
            _verdict(r),
        ]
        for r in content["membership"]
    ]


def _verdict(row: Json) -> str:
    if row["at_chance"]:
        return "at chance"
    return "above chance" if row["auroc"] > 0.5 else "below chance"


def inversion_rows(content: Json) -> list[list[str]]:
    """Format one table row for each training step and variant, with the columns `INVERSION`."""
    return [
        [
            r["client"],
            str(r["step"]),
            "none (mean image)" if r["way"] == "blind" else r["way"],
            "exact" if r["psnr"] >= EXACT else f"{r['psnr']:.1f}",
            f"{r['ssim']:.2f}",
            LABELS.get(r.get("label", ""), ""),
        ]
        for r in content["inversion"]
    ]


def draw_audit(content: Json, pictures: list[Json]) -> bytes:
    """Draw ROC curves above original and reconstructed images.

    Args:
        content: The content of `audit.json`.
        pictures: See `write_audit`. At most 8 images are drawn.

    Returns:
        The figure as PNG. Parts without results are omitted.
    """
    columns = [(p, i) for p in pictures for i in range(len(p["true"]))][:MAX_COLUMNS]
    ways = list(pictures[0]["found"]) if pictures else []
    grid = 0.55 + (len(ways) + 1) * 0.98 if columns else 0.0
    heights = [h for h in (2.9 if content["membership"] else 0.0, grid) if h]
    if not heights:
        return style.to_png(style.figure(0.1))
    figure = style.figure(sum(heights))
    parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if content["membership"]:
        _membership(parts.pop(0), content["membership"])
    if columns:
        _images(parts.pop(0), columns, ways, content["inversion"])
    return style.to_png(figure)


def _membership(part: FigureBase, rows: list[Json]) -> None:
    curves, areas = part.subplots(1, 2, width_ratios=[1, 1.25])
    clients = list(dict.fromkeys(r["client"] for r in rows))
    for r in rows:
        alarms, hits = np.array(r["curve"]).T
        curves.plot(
            alarms,
            hits,
            color=COLORS[r["attack"]],
            linestyle=list(LINES)[clients.index(r["client"]) % 4],
            linewidth=1.2,
        )
    curves.plot([0, 1], [0, 1], color=style.LIGHT, linewidth=0.9, zorder=0)
    curves.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="false positive rate",
        ylabel="true positive rate",
        title="Membership inference",
    )
    words = list(LINES.values())
    names = [
        f"{style.shorten(r['client'])} ({words[clients.index(r['client']) % 4]})\n"
        f"{ATTACKS[r['attack']]}"
        for r in rows
    ]
    for place, r in enumerate(rows):
        areas.errorbar(
            r["auroc"],
            place,
            xerr=2 * r["auroc_se"],
            fmt="o",
            color=COLORS[r["attack"]],
            capsize=2.5,
        )
    areas.axvline(0.5, color=style.INK, linewidth=0.9, linestyle=(0, (1, 1.5)))
    areas.set_yticks(range(len(rows)), names)
    areas.set(
        ylim=(len(rows) - 0.4, -0.6),
        xlabel="AUROC ± 2 s.e.; dotted: chance",
        title="Area under the ROC curve",
    )


def _images(
    part: FigureBase, columns: list[tuple[Json, int]], ways: list[str], rows: list[Json]
) -> None:
    cells = part.subplots(len(ways) + 1, len(columns), squeeze=False)
    psnr = {(r["client"], r["step"], r["way"]): r["psnr"] for r in rows}
    for column, (picture, i) in enumerate(columns):
        shown: list[tuple[str, Tensor]] = [("original", picture["true"]), *picture["found"].items()]
        for line, (way, images) in enumerate(shown):
            axes = cells[line, column]
            style.remove_axes(axes)
            axes.set_xticks([])
            axes.set_yticks([])
            image = images[i].movedim(0, -1).numpy().clip(0, 1)
            axes.imshow(
                image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1
            )
            if line:
                value = psnr[picture["client"], picture["step"], way]
                axes.set_xlabel(
                    "exact" if value >= EXACT else f"{value:.1f} dB", labelpad=1, fontsize=7.5
                )
            else:
                axes.set_title(
                    style.shorten(picture["client"], 12),
                    fontsize=8,
                    fontweight="normal",
                    loc="center",
                )
            if column == 0:
                axes.set_ylabel(
                    way.replace(" ", "\n", 1), rotation=0, ha="right", va="center", fontsize=8
                )

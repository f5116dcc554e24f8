"""All plots of all kinds of runs are drawn without warnings and show the recorded values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hetero_fl.reporting import report
from hetero_fl.reporting.formatting import METRICS, capitalize_first
from hetero_fl.reporting.plots import (
    clients,
    rounds as round_plots,
    scores as score_plots,
    style,
    write_plots,
)
from hetero_fl.reporting.report import write_report
from hetero_fl.reporting.run_directory import RunDirectory
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.figures import drawn

MakeRun = Callable[..., RunDirectory]
ALL = ["curves", "clients", "labels", "communication", "confusion", "calibration"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "names"),
    [
        ({"failures": True}, ALL),
        (
            {"clients": 2, "rounds": 1, "proxy": 0, "server": False, "exchange": False},
            [*ALL[:3], *ALL[4:]],
        ),
        ({"kind": "regression", "proxy": 0, "server": False}, ALL[:4]),
        ({"kind": "regression", "clients": 60, "rounds": 2}, ALL[:4]),
        ({"kind": "multiclass", "classes": 10, "clients": 60, "every": 5, "server": False}, ALL),
        ({"kind": "multilabel", "classes": 14, "clients": 8, "rounds": 2}, ALL),
        ({"home": False, "clients": 3}, ALL),
        ({"common": False, "server": False, "clients": 14}, ALL),
        ({"clients": 600, "rounds": 3, "kind": "multiclass", "classes": 30}, ALL),
        ({"clients": 1, "rounds": 2}, ALL),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
)
def test_plots_of_every_kind_of_run(
    made_run: MakeRun, case: dict[str, Any], names: list[str]
) -> None:
    run, before = made_run(**case), dict(rcParams)
    paths = write_plots(run.path)
    assert paths == [run.path / "plots" / f"{name}.png" for name in names]
    for path in paths:
        content = path.read_bytes()
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert content.startswith(b"\x89PNG") and width <= 2300 and 400 <= height <= 4000, (
            path.name,
            width,
            height,
        )
    assert dict(rcParams) == before, "matplotlib's settings are the user's"


def test_unfinished_run_has_no_plots(made_run: MakeRun) -> None:
    run = made_run(rounds=1)
    (run.path / "summary.json").unlink()
    with pytest.raises(UserError, match=r"summary.json"):
        write_plots(run.path)
    assert not run.plots.exists()


@pytest.mark.slow
def test_failed_plot_or_report_is_reported_and_left_out(
    made_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, messages = made_run(rounds=1), list[str]()
    fails = Mock(side_effect=OverflowError("cannot convert\nfloat infinity to integer"))
    monkeypatch.setattr(clients, "plot_client_scores", fails)
    monkeypatch.setattr(report, "docstring_paragraph", lambda label: 1 / 0)

    paths = write_plots(run.path, messages.append)
    write_report(run.path, messages.append)

    assert [path.stem for path in paths] == [name for name in ALL if name != "clients"]
    assert not (run.path / "report.html").exists()
    assert messages == [
        "the plot 'clients' cannot be drawn: OverflowError: "
        "cannot convert float infinity to integer",
        "the report cannot be written: ZeroDivisionError: division by zero",
    ]
    for write, error in ((write_plots, OverflowError), (write_report, ZeroDivisionError)):
        with pytest.raises(error):
            write(run.path)


def lines(figure: Figure, panel: int, color: str) -> list[np.ndarray]:
    """Return the data of the lines of one color in a panel: curve and last round."""
    found = [line for line in figure.axes[panel].lines if line.get_color() == color]
    return [np.array(line.get_data()) for line in found]


def test_curves_show_records_last_and_selected_rounds(made_run: MakeRun) -> None:
    run = made_run(every=5, rounds=12)
    summary, records = run.summary(), run.metrics()
    figure = drawn(round_plots.plot_curves, summary, records, run.details(), "round")
    read = [r for r in records if "global" in r]
    curve, last = lines(figure, 0, style.TEST_COLORS["global"])[:2]
    assert curve[0].tolist() == [5, 10, 12]
    assert curve[1].tolist() == [r["global"]["balanced_accuracy"] for r in read]
    assert last.ravel().tolist() == [12, summary["global"]["last"]["balanced_accuracy"]]
    best = summary["server"]["best_by_validation"]
    chosen = [line for line in figure.axes[1].lines if line.get_marker() == "D"]
    marked = {
        line.get_markeredgecolor(): np.array(line.get_data()).ravel().tolist() for line in chosen
    }
    assert marked[style.TEST_COLORS["server"]] == [best["round"], best["auroc"]]
    assert len(marked) == 3
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    scores = read[0]["global"]
    low, high = (
        scores["balanced_accuracy"] + sign * scores["balanced_accuracy_std"] for sign in (-1, 1)
    )
    assert {round(float(y), 9) for x, y in band if x == 5} == {round(low, 9), round(high, 9)}


@each_case("rounds", [1, 2, 7])
def test_round_ticks_are_integers(made_run: MakeRun, rounds: int) -> None:
    run = made_run(rounds=rounds)
    for axes in drawn(
        round_plots.plot_curves, run.summary(), run.metrics(), run.details(), "round"
    ).axes:
        ticks = axes.get_xticks()
        assert len(ticks) and all(float(tick).is_integer() for tick in ticks)


@each_case(
    ("kind", "classes", "name"), [("binary", 2, "balanced_accuracy"), ("multilabel", 14, "auroc")]
)
def test_first_plot_shows_the_selection_metric(
    made_run: MakeRun, kind: str, classes: int, name: str
) -> None:
    run = made_run(kind=kind, classes=classes, rounds=2)
    summary, records, details = run.summary(), run.metrics(), run.details()
    for x in ("round", "bytes"):
        figure = drawn(round_plots.plot_curves, summary, records, details, x)
        assert figure.axes[0].get_title(loc="left") == capitalize_first(METRICS[name])
        shown = lines(figure, 0, style.TEST_COLORS["personal"])[0][1]
        assert shown.tolist() == [r["personal"][name] for r in records]


def test_curves_leave_out_undefined_rounds(made_run: MakeRun) -> None:
    run = made_run(rounds=4, server=False)
    summary, records = run.summary(), run.metrics()
    for record in records:
        record["personal"]["auroc"] = None
    records[1]["global"]["auroc"] = None
    figure = drawn(round_plots.plot_curves, summary, records, run.details(), "round")
    assert lines(figure, 1, style.TEST_COLORS["global"])[0][0].tolist() == [1, 3, 4]
    assert not lines(figure, 1, style.TEST_COLORS["personal"])
    for record in records:
        record["global"]["auroc"] = None
    (words,) = (
        drawn(round_plots.plot_curves, summary, records, run.details(), "round").axes[1].texts
    )
    assert words.get_text().startswith("undefined")


def test_bytes_are_summed_over_all_rounds(made_run: MakeRun) -> None:
    run = made_run(every=5, rounds=12)
    figure = drawn(round_plots.plot_curves, run.summary(), run.metrics(), run.details(), "bytes")
    curve = lines(figure, 0, style.TEST_COLORS["personal"])[0]
    assert curve[0] == pytest.approx([0.72 * r for r in (5, 10, 12)])
    assert "(MB)" in figure.axes[0].get_xlabel()


def test_client_plot_shows_local_and_global_test(made_run: MakeRun) -> None:
    run = made_run(clients=6)
    summary, details = run.summary(), run.details()
    summary["clients"][2]["personal"] = None
    for client, rows in details["rows"].items():
        rows["test"] = {"hospital_4": 19, "hospital_5": 20}.get(client, 60)
    figure = drawn(clients.plot_client_scores, summary, details)
    named = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert named[2:5] == ["hospital_3 (n = 60)", "hospital_4 (n = 19)", "hospital_5 (n = 20)"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Balanced accuracy", "Accuracy"]
    home, hollow = lines(figure, 0, style.TEST_COLORS["personal"])
    assert (
        np.isnan(home[0][2])
        and home[0][3] == summary["clients"][3]["personal"]["balanced_accuracy"]
    )
    assert hollow.tolist() == [[home[0][3]], [3]], "19 rows are few, 20 are not"
    assert [text.get_text() for text in figure.legends[0].texts][2:] == [
        "uncertain: n < 20 local test rows"
    ]


def test_client_plot_marks_few_test_rows(made_run: MakeRun) -> None:
    run = made_run(clients=50)
    details = run.details()
    for k, rows in enumerate(details["rows"].values()):
        rows["test"] = 7 if k < 5 else 30
    figure = drawn(clients.plot_client_scores, run.summary(), details)
    full, hollow = (
        sum(
            len(c.get_offsets())
            for c in figure.axes[0].collections
            if (len(c.get_facecolor()) > 0) == filled
        )
        for filled in (True, False)
    )
    assert (full, hollow) == (45, 5) and figure.axes[0].get_xlabel() == "local test (n = 7 to 30)"


def labels_of(run: RunDirectory) -> Axes:
    """Return the panel of the plot of labels."""
    return drawn(clients.plot_labels, run.summary(), run.details()).axes[0]


@each_case(("kind", "num_clients"), [("binary", 4), ("binary", 41), ("regression", 3)])
def test_label_plot_is_a_heat_map(made_run: MakeRun, kind: str, num_clients: int) -> None:
    run = made_run(kind=kind, clients=num_clients)
    details = run.details()
    counts = np.array(list(details["label_counts"].values()))
    if kind == "regression":
        counts = np.array([list(rows.values()) for rows in details["rows"].values()])
    axes = labels_of(run)
    expected = counts if kind == "regression" else counts / counts.sum(1, keepdims=True)
    (image,) = axes.images
    shown = np.asarray(image.get_array()).T
    order = np.lexsort((-expected.max(1), expected.argmax(1)))
    assert shown == pytest.approx(expected[order])
    written = [text.get_text() for text in axes.texts]
    assert written == ([f"{n}" for n in counts[order].ravel()] if num_clients < 13 else [])


def test_label_plot_shows_the_most_frequent_labels(made_run: MakeRun) -> None:
    run = made_run(clients=5, kind="multiclass", classes=30)
    details = run.details()
    counts = np.array(list(details["label_counts"].values()))
    axes = labels_of(run)
    (image,) = axes.images
    most = np.argsort(-counts.sum(0), kind="stable")[:20]
    assert [t.get_text() for t in axes.get_yticklabels()] == [details["labels"][c] for c in most]
    assert axes.get_title(loc="left") == "The 20 most frequent of 30 labels"
    share = counts / counts.sum(1, keepdims=True)  # shares of all rows of a client
    assert np.sort(np.asarray(image.get_array()).sum(0)) == pytest.approx(
        np.sort(share[:, most].sum(1))
    )


def images(figure: Figure) -> list[np.ndarray]:
    """Return the matrices of the panels; the color bar has no image."""
    return [np.array(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_confusion_rows_are_shares_of_the_truth(made_run: MakeRun) -> None:
    run = made_run(clients=2)
    details = run.details()
    details["confusion"]["hospital_1"]["global"] = [[3, 1], [0, 0]]
    del details["confusion"]["hospital_2"]["global"]
    (shown,) = images(drawn(score_plots.plot_confusion, run.summary(), details))
    assert shown[0].tolist() == [0.75, 0.25]
    assert np.isnan(shown[1]).all(), "a class without test rows"


def test_confusion_panels_share_order_and_scale(made_run: MakeRun) -> None:
    run = made_run(kind="multiclass", classes=10)
    summary, details = run.summary(), run.details()
    details["confusion"] = dict(reversed(details["confusion"].items()))
    figure = drawn(score_plots.plot_confusion, summary, details)
    panels = [axes for axes in figure.axes if axes.images]
    assert {axes.images[0].get_clim() for axes in panels} == {(0.0, 1.0)}
    assert len([axes for axes in figure.axes if not axes.images and axes.get_visible()]) == 1
    titles = [axes.get_title(loc="center") for axes in panels]
    ranked = sorted(summary["clients"], key=lambda c: c["global"]["balanced_accuracy"])
    assert titles == ["all clients", *(c["id"] for c in ranked)]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == details["labels"]
    assert [t.get_text() for t in panels[-1].get_xticklabels()] == details["labels"]
    matrix = np.array(details["confusion"]["hospital_4"]["global"], dtype=float)
    shown = images(figure)[titles.index("hospital_4")]
    assert shown == pytest.approx(matrix / matrix.sum(1, keepdims=True))


def test_confusion_of_many_clients_shows_sum_and_weakest(made_run: MakeRun) -> None:
    run = made_run(clients=20)
    summary, details = run.summary(), run.details()
    figure = drawn(score_plots.plot_confusion, summary, details)
    titles = [axes.get_title(loc="center") for axes in figure.axes if axes.images]
    ranked = sorted(summary["clients"], key=lambda c: c["global"]["balanced_accuracy"])
    assert titles == ["all clients", *(c["id"] for c in ranked[:11])]
    total = np.sum([m["global"] for m in details["confusion"].values()], axis=0)
    assert images(figure)[0] == pytest.approx(total / total.sum(1, keepdims=True))


def test_multilabel_confusion_has_one_matrix_per_label(made_run: MakeRun) -> None:
    run = made_run(kind="multilabel", classes=14, clients=3)
    total = np.sum([m["global"] for m in run.details()["confusion"].values()], axis=0)
    shown = images(drawn(score_plots.plot_confusion, run.summary(), run.details()))
    assert len(shown) == 14
    assert shown[5] == pytest.approx(total[5] / total[5].sum(1, keepdims=True))


def test_calibration_pools_predictions_of_all_clients(made_run: MakeRun) -> None:
    run = made_run(clients=13)
    details = run.details()
    figure = drawn(score_plots.plot_calibration, run.summary(), details)
    found = [c["global"] for c in details["calibration"].values()]
    count = np.array([f["count"] for f in found], dtype=float)
    sums = [
        np.nansum(np.array([f[k] for f in found], dtype=float) * count, 0)
        for k in ("confidence", "accuracy")
    ]
    error = np.abs(sums[0] - sums[1]).sum() / count.sum()
    words = [text.get_text() for text in figure.axes[0].texts]
    assert f"global test ECE {error:.3f}" in words
    kept = count.sum(0) > 0
    curve = lines(figure, 0, style.TEST_COLORS["global"])[0]
    assert curve == pytest.approx(np.array(sums)[:, kept] / count.sum(0)[kept])


def test_calibration_marks_bins_with_a_single_prediction(made_run: MakeRun) -> None:
    run = made_run(clients=1)
    details = run.details()
    bins: dict[str, list[float]] = {
        "count": [5, 1, 4],
        "confidence": [0.2, 0.5, 0.8],
        "accuracy": [0.4, 1.0, 0.5],
    }
    details["calibration"] = {"hospital_1": {"global": {"ece": 0.2, **bins}}}

    figure = drawn(score_plots.plot_calibration, run.summary(), details)
    bins["count"][1] = 2
    without = drawn(score_plots.plot_calibration, run.summary(), details)

    curve = lines(figure, 0, style.TEST_COLORS["global"])[0]
    assert curve.tolist() == [[0.2, 0.8], [0.4, 0.5]]
    points = figure.axes[0].collections[0]
    assert points.get_facecolor()[1].tolist() == [1, 1, 1, 1]
    assert points.get_linewidths()[1] > 0 == points.get_linewidths()[0]
    legends = [[t.get_text() for t in f.legends[0].get_texts()] for f in (figure, without)]
    assert legends[0][-1] == "single prediction" not in legends[1]


def test_calibration_omits_clients_without_test_rows(made_run: MakeRun) -> None:
    run = made_run(clients=3)
    details = run.details()
    details["calibration"] = {client: {} for client in details["calibration"]}
    assert score_plots.plot_calibration(run.summary(), details) is None
    empty = {"ece": None, "confidence": [], "accuracy": [], "count": []}
    details["calibration"]["hospital_2"] = {"personal": empty}
    assert score_plots.plot_calibration(run.summary(), details) is None
    details["calibration"]["hospital_1"] = run.details()["calibration"]["hospital_1"]
    (panel,) = drawn(score_plots.plot_calibration, run.summary(), details).axes
    assert panel.get_title(loc="left") == "all clients"


def test_privacy_plot_shows_the_budget_spent_per_round() -> None:
    records = [{"round": r, "privacy": {"epsilon": e}} for r, e in [(1, 0.5), (2, 0.7)]]

    figure = round_plots.plot_privacy({"privacy": {"delta": 1e-5}}, records)

    assert figure is not None
    axes = figure.axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 0.5], [2, 0.7]]
    assert "1e-05" in axes.get_ylabel()
    assert round_plots.plot_privacy({}, records) is None

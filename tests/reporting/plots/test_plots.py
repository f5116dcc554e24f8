"""All plots of all kinds of runs are drawn and show the recorded values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.dates import num2date
from matplotlib.figure import Figure

from hetero_fl.reporting import report
from hetero_fl.reporting.plots import clients, rounds as round_plots, style, write_plots
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
    run = made_run(**case)
    before = dict(rcParams)

    paths = write_plots(run.path)

    assert paths == [run.path / "plots" / f"{name}.png" for name in names]
    for path in paths:
        content = path.read_bytes()
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert content.startswith(b"\x89PNG")
        assert width <= 2300 and 400 <= height <= 4000, path.name
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
    run = made_run(rounds=1)
    messages: list[str] = []
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


def points(figure: Figure, panel: int, color: str) -> list[np.ndarray]:
    """Return the data of the lines and points of one color in a panel."""
    found = figure.axes[panel].lines
    return [np.array(line.get_data()) for line in found if line.get_markeredgecolor() == color]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_show_records_spread_and_selected_rounds(made_run: MakeRun) -> None:
    run = made_run(every=5, rounds=12)
    records = run.metrics()

    figure = drawn(round_plots.plot_curves, run.summary(), records, run.details(), "round")

    evaluated = [record for record in records if "global" in record]
    curve, _ = points(figure, 0, style.TEST_COLORS["global"])
    _, selected = points(figure, 1, style.TEST_COLORS["server"])
    best = run.summary()["server"]["best_by_validation"]
    assert curve[0].tolist() == [5, 10, 12]
    assert curve[1].tolist() == [record["global"]["balanced_accuracy"] for record in evaluated]
    assert selected.ravel().tolist() == [best["round"], best["auroc"]]
    band = figure.axes[0].collections[1].get_paths()[0].vertices
    scores = evaluated[0]["global"]
    mean = scores["balanced_accuracy"]
    edges = [mean - scores["balanced_accuracy_std"], mean + scores["balanced_accuracy_std"]]
    assert sorted({round(float(y), 9) for x, y in band if x == 5}) == pytest.approx(edges)
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())
    assert {"selected by validation", "server's model"} <= {*legend(figure)}


def test_curves_leave_out_undefined_rounds(made_run: MakeRun) -> None:
    run = made_run(rounds=4, server=False)
    records = run.metrics()
    for record in records:
        record["personal"]["auroc"] = None
    records[1]["global"]["auroc"] = None

    figure = drawn(round_plots.plot_curves, run.summary(), records, run.details(), "round")

    assert points(figure, 1, style.TEST_COLORS["global"])[0][0].tolist() == [1, 3, 4]
    assert not points(figure, 1, style.TEST_COLORS["personal"])
    for record in records:
        record["global"]["auroc"] = None
    figure = drawn(round_plots.plot_curves, run.summary(), records, run.details(), "round")
    assert figure.axes[1].texts[0].get_text().startswith("undefined")


def test_curves_over_bytes_sum_all_rounds_and_show_the_selection_metric(made_run: MakeRun) -> None:
    run = made_run(every=5, rounds=12, kind="multilabel", classes=14)

    figure = drawn(round_plots.plot_curves, run.summary(), run.metrics(), run.details(), "bytes")

    curve = points(figure, 0, style.TEST_COLORS["personal"])[0]
    assert curve[0] == pytest.approx([0.72 * r for r in (5, 10, 12)])
    assert figure.axes[0].get_xlabel() == "cumulative communication (MB)"
    assert figure.axes[0].get_title(loc="left") == "AUROC"


def test_client_plot_shows_both_tests_and_marks_few_test_rows(made_run: MakeRun) -> None:
    run = made_run(clients=6)
    summary = run.summary()
    details = run.details()
    summary["clients"][2]["personal"] = None
    for client, rows in details["rows"].items():
        rows["test"] = {"hospital_4": 19, "hospital_5": 20}.get(client, 60)

    figure = drawn(clients.plot_client_scores, summary, details)

    named = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    local, uncertain = points(figure, 0, style.TEST_COLORS["personal"])
    scores = [row["global"]["balanced_accuracy"] for row in summary["clients"]]
    assert named[2:5] == ["hospital_3 (n = 60)", "hospital_4 (n = 19)", "hospital_5 (n = 20)"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Balanced accuracy", "Accuracy"]
    assert local[1].tolist() == [0, 1, 4, 5] and uncertain[1].tolist() == [3]
    assert points(figure, 0, style.TEST_COLORS["global"])[0][0].tolist() == scores
    assert "uncertain: n < 20 local test rows" in legend(figure)


@each_case(
    ("kind", "classes", "num_clients"),
    [("binary", 2, 4), ("binary", 2, 41), ("regression", 1, 3), ("multiclass", 30, 5)],
)
def test_label_plot_is_a_heat_map_of_the_most_frequent_labels(
    made_run: MakeRun, kind: str, classes: int, num_clients: int
) -> None:
    run = made_run(kind=kind, classes=classes, clients=num_clients)
    details = run.details()
    counts = np.array(list(details["label_counts"].values()))
    if kind == "regression":
        counts = np.array([list(rows.values()) for rows in details["rows"].values()])
    shares = counts if kind == "regression" else counts / counts.sum(1, keepdims=True)
    kept = np.argsort(-counts.sum(0), kind="stable")[:20] if classes > 20 else slice(None)

    axes = drawn(clients.plot_labels, run.summary(), details).axes[0]

    shades = shares[:, kept]
    order = np.lexsort((-shades.max(1), shades.argmax(1)))
    numbers = counts[order][:, kept].T.astype(str).ravel().tolist()
    assert pytest.approx(shades[order]) == np.asarray(axes.images[0].get_array()).T
    assert [text.get_text() for text in axes.texts] == (numbers if num_clients < 13 else [])
    title = "The 20 most frequent of 30 labels" if classes > 20 else ""
    assert axes.get_title(loc="left") == title


def matrices(figure: Figure) -> dict[str, np.ndarray]:
    """Return the matrices of the panels, keyed by title. The color bar has no image."""
    panels = [axes for axes in figure.axes if axes.images]
    return {axes.get_title(loc="center"): np.array(axes.images[0].get_array()) for axes in panels}


def test_confusion_rows_are_shares_of_the_true_class(made_run: MakeRun) -> None:
    run = made_run(clients=2)
    details = run.details()
    details["confusion"]["hospital_1"]["global"] = [[3, 1], [0, 0]]
    del details["confusion"]["hospital_2"]["global"]

    (shown,) = matrices(drawn(clients.plot_confusion, run.summary(), details)).values()

    assert shown[0].tolist() == [0.75, 0.25]
    assert np.isnan(shown[1]).all(), "a class without test rows"


@each_case(("num_clients", "classes"), [(6, 10), (20, 2)])
def test_confusion_shows_the_sum_and_the_weakest_clients(
    made_run: MakeRun, num_clients: int, classes: int
) -> None:
    run = made_run(kind="multiclass", classes=classes, clients=num_clients)
    summary = run.summary()
    details = run.details()
    counts = {client: np.array(m["global"]) for client, m in details["confusion"].items()}

    figure = drawn(clients.plot_confusion, summary, details)

    shown = matrices(figure)
    ranked = sorted(summary["clients"], key=lambda c: c["global"]["balanced_accuracy"])
    assert list(shown) == ["all clients", *(c["id"] for c in ranked[:11])]
    for title, matrix in {**counts, "all clients": sum(counts.values())}.items():
        if title in shown:
            assert shown[title] == pytest.approx(matrix / matrix.sum(1, keepdims=True))
    assert {axes.images[0].get_clim() for axes in figure.axes if axes.images} == {(0.0, 1.0)}
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == details["labels"]


def test_multilabel_confusion_has_one_matrix_per_label(made_run: MakeRun) -> None:
    run = made_run(kind="multilabel", classes=14, clients=3)
    details = run.details()
    total = np.sum([m["global"] for m in details["confusion"].values()], axis=0)

    shown = matrices(drawn(clients.plot_confusion, run.summary(), details))

    assert list(shown) == details["labels"][:12]
    assert shown[details["labels"][5]] == pytest.approx(total[5] / total[5].sum(1, keepdims=True))


def test_calibration_pools_predictions_of_all_clients(made_run: MakeRun) -> None:
    run = made_run(clients=13)
    details = run.details()
    found = [tests["global"] for tests in details["calibration"].values()]
    count = np.array([bins["count"] for bins in found], dtype=float)
    confidence, accuracy = (
        np.nansum(np.array([bins[k] for bins in found], dtype=float) * count, 0)
        for k in ("confidence", "accuracy")
    )
    error = np.abs(confidence - accuracy).sum() / count.sum()
    total = count.sum(0)

    figure = drawn(clients.plot_calibration, run.summary(), details)

    shown = np.asarray(figure.axes[0].collections[0].get_offsets())
    kept = total > 1
    assert f"global test ECE {error:.3f}" in figure.axes[0].get_title("left").splitlines()
    assert shown == pytest.approx(np.array([confidence, accuracy])[:, kept].T / total[kept, None])


def test_calibration_omits_clients_without_test_rows_and_single_predictions(
    made_run: MakeRun,
) -> None:
    run = made_run(clients=3)
    details = run.details()
    details["calibration"] = {client: {} for client in details["calibration"]}
    empty = {"ece": None, "confidence": [], "accuracy": [], "count": []}
    details["calibration"]["hospital_2"] = {"personal": empty}
    assert clients.plot_calibration(run.summary(), details) is None
    bins = {"count": [5, 1, 4], "confidence": [0.2, 0.5, 0.8], "accuracy": [0.4, 1.0, 0.5]}
    details["calibration"]["hospital_1"] = {"global": {"ece": 0.2, **bins}}

    (panel,) = drawn(clients.plot_calibration, run.summary(), details).axes

    assert panel.get_title("left") == "all clients\nglobal test ECE 0.270"
    assert panel.collections[0].get_offsets().tolist() == [[0.2, 0.4], [0.8, 0.5]]


def test_privacy_plot_shows_the_budget_spent_per_round() -> None:
    records = [{"round": r, "privacy": {"epsilon": e}} for r, e in [(1, 0.5), (2, 0.7)]]

    (axes,) = drawn(round_plots.plot_privacy, {"privacy": {"delta": 1e-5}}, records).axes

    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 0.5], [2, 0.7]]
    assert "1e-05" in axes.get_ylabel()
    assert round_plots.plot_privacy({}, records) is None


BEGIN = 1_672_531_200  # 1 January 2023


def make_forecasts(
    num_clients: int = 2, begin: int = BEGIN, rules: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the summary and the details of a run with forecasts of one and six hours."""
    near = np.arange(48.0) % 24
    found: dict[str, Any] = {
        "time": (begin + 3600 * np.arange(48)).tolist(),
        "truth": [near + 5, near],
        "predicted": [near + 5, near + 2],
        "baselines": {"close": [near, near + 1], "wide": [near, near + 5]} if rules else {},
    }
    ids = [f"c{i}" for i in range(num_clients)]
    details = {"forecast": dict.fromkeys(ids, found), "labels": ["1 h", "6 h"], "unit": "cars"}
    return {"clients": [{"id": i} for i in ids]}, details


def test_forecast_shows_last_output_and_best_rule() -> None:
    figure = drawn(clients.plot_forecasts, *make_forecasts())

    axes = figure.axes[0]
    truth, forecast, rule = (np.asarray(line.get_ydata()) for line in axes.lines)
    start = num2date(axes.lines[0].get_xdata(orig=False)[0])
    assert len(figure.axes) == 2 and figure.get_supylabel() == "cars"
    assert np.allclose(forecast, truth + 2) and np.allclose(rule, truth + 1)
    assert axes.get_title("left") == "c0, 6 h: mean absolute error 2.00, “close” 1.00"
    assert start.strftime("%Y-%m-%d") == "2023-01-01"


# Times beyond the calendar are numbers.
@each_case("begin", [0, 1_672_531_200_000_000_000])
def test_forecast_without_dates_and_baselines(begin: int) -> None:
    figure = drawn(clients.plot_forecasts, *make_forecasts(30, begin, rules=False))

    assert len(figure.axes) == clients.FORECAST_PANELS and len(figure.axes[0].lines) == 2
    assert figure.axes[0].lines[0].get_xdata()[1] == begin + 3600
    assert style.to_png(figure)
    assert clients.plot_forecasts({"clients": [{"id": "c0"}]}, {"labels": ["load"]}) is None

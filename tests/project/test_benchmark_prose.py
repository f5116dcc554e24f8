"""Figures in sentences about the benchmark are those of the archived runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from hetero_fl.experiment.benchmark.archive import RunArchive
from hetero_fl.experiment.benchmark.results import MAIN_GROUP, BenchmarkResults
from hetero_fl.reporting.benchmark.scores import FederationScores

ROOT = Path(__file__).parents[2]
FINDING = ROOT / "docs" / "results" / "finding.md"
MEASUREMENTS = ROOT / "docs" / "results" / "measurements"
PROTOCOL = ROOT / "docs" / "benchmark" / "README.md"
LABEL_SKEW = ROOT / "docs" / "explanation" / "label_skew.md"
COMPRESSION = ROOT / "docs" / "how_to" / "compression.md"
CHOOSE = ROOT / "docs" / "how_to" / "choose_method.md"
GLOBAL, LOCAL = "global_last_balanced_accuracy", "personal_last_accuracy"
BALANCED = "personal_last_balanced_accuracy"


@pytest.fixture(scope="module")
def results() -> BenchmarkResults:
    return BenchmarkResults(ROOT / "configs" / "benchmark", ROOT / "docs" / "benchmark")


def sentences(page: Path) -> str:
    """Return the text of a page without line breaks."""
    return " ".join(page.read_text(encoding="utf-8").split())


def method_row(method: str) -> tuple[str, str]:
    """Return the row of a method with components."""
    return method, "all"


def lead(
    scores: FederationScores, row: tuple[str, str], other: tuple[str, str], metric: str = GLOBAL
) -> float:
    """Return by how many points a row is ahead of another row."""
    mean, reference = scores.mean(row, metric), scores.mean(other, metric)
    assert mean is not None and reference is not None
    return 100 * (mean - reference)


def computation(scores: FederationScores, method: str) -> float:
    """Return the operations of a run at clients and server, with components."""
    return sum(
        scores.mean((method, "all"), f"{place}_operations") or 0.0 for place in ("client", "server")
    )


def test_effects_of_components_are_those_of_the_archive(results: BenchmarkResults) -> None:
    effects = [
        lead(results.scores[name], (method, "all"), (method, "none"))
        for name in ("digits", "fashion_dirichlet", "fashion_classes", "xrays_one")
        for method in ("fedmd", "feddf", "ds_fl", "hybrid")
    ]

    line = f"of all four distilling methods by {min(effects):.0f} to {max(effects):.0f} points"
    assert line in sentences(FINDING)


def test_ratios_of_computation_are_those_of_the_archive(results: BenchmarkResults) -> None:
    ratios = {
        method: [
            computation(scores, "hybrid") / computation(scores, method)
            for scores in results.groups[MAIN_GROUP]
        ]
        for method in ("fedavg", "feddf", "fedmd", "ds_fl")
    }

    averaging = (
        f"{min(ratios['fedavg']):.1f} to {max(ratios['fedavg']):.1f} times as much as FedAvg"
    )
    distilling = f"{min(ratios['feddf']):.1f} to {max(ratios['feddf']):.1f} times as much as FedDF"
    assert averaging in sentences(FINDING)
    assert distilling in sentences(FINDING) and distilling in sentences(PROTOCOL)
    at_clients = [*ratios["fedmd"], *ratios["ds_fl"]]
    assert min(at_clients) == pytest.approx(1 / 3, abs=0.03)
    assert max(at_clients) == pytest.approx(4 / 5, abs=0.03)


def test_advice_has_the_figures_of_the_archive(results: BenchmarkResults) -> None:
    text = sentences(CHOOSE)
    hybrid, fml = ("hybrid", "all"), ("fml", "all")
    digits, dirichlet = results.scores["digits"], results.scores["fashion_dirichlet"]
    averaging = [
        lead(scores, ("fedavg", "all"), ("local", "all")) for scores in results.groups[MAIN_GROUP]
    ]
    ditto = {
        name: lead(results.scores[name], ("ditto", "all"), ("local", "all"), LOCAL)
        for name in ("digits", "xrays_three")
    }

    assert f"{lead(digits, fml, hybrid):.1f} points ahead of Hybrid on the global test" in text
    assert f"with Dirichlet partitions {lead(dirichlet, hybrid, fml):.1f} points behind" in text
    assert f"FedAvg is {min(averaging):.0f} to {max(averaging):.0f} points ahead of Local" in text
    assert f"{ditto['digits']:.1f} points better (digits)" in text
    assert f"{-ditto['xrays_three']:.1f} points worse (X-rays)" in text


def test_leads_with_equal_statistics_are_those_of_the_measurement(
    results: BenchmarkResults,
) -> None:
    text = (MEASUREMENTS / "recalibration.txt").read_text(encoding="utf-8")
    means = {}
    for line in text.splitlines():
        if "±" in line:
            _, row, _, *scores, _, _ = (cell.strip() for cell in line.split("|"))
            means[row] = [float(score.split()[0]) for score in scores]
    hybrid, feddf = means["Hybrid + components"], means["FedDF + components"]
    equal = [f"{one - other:.1f}" for one, other in zip(hybrid, feddf, strict=True)]
    archived = lead(results.scores["xrays_three"], ("hybrid", "all"), ("feddf", "all"))

    line = f"it is {equal[0]} or {equal[1]} points instead of {archived:.1f}"
    assert line in sentences(FINDING)


def test_difference_by_replay_is_that_of_the_archive(results: BenchmarkResults) -> None:
    difference = lead(results.scores["fashion_classes"], ("hybrid", "all"), ("feddf", "all"))

    assert f"With two classes per client, they differ by {difference:.1f} points" in sentences(
        FINDING
    )


def test_fedprox_is_compared_as_in_the_archive(results: BenchmarkResults) -> None:
    found = [results.scores[name] for name in ("digits", "fashion_dirichlet", "sensors")]
    prox, average, hybrid = (method_row(name) for name in ("fedprox", "fedavg", "hybrid"))
    ahead = [lead(scores, prox, average) for scores in found]
    behind = [lead(scores, hybrid, prox) for scores in found]

    assert f"FedProx another {min(ahead):.0f} to {max(ahead):.0f} points" in sentences(CHOOSE)
    assert (
        f"{min(ahead):.0f} to {max(ahead):.0f} points ahead of FedAvg, and {min(behind):.0f} to "
        f"{max(behind):.0f} points behind Hybrid" in sentences(FINDING)
    )


def test_losses_with_one_network_are_those_of_the_archive(results: BenchmarkResults) -> None:
    hybrid, average, ds_fl = (method_row(name) for name in ("hybrid", "fedavg", "ds_fl"))
    digits, dirichlet = results.scores["digits_common"], results.scores["fashion_dirichlet_common"]
    lines = (
        f"FedAvg is ahead on the digits ({lead(digits, average, hybrid):.1f} points; on local "
        f"tests {lead(digits, average, hybrid, LOCAL):.1f} in accuracy and "
        f"{lead(digits, average, hybrid, BALANCED):.1f} in balanced accuracy)",
        f"{lead(dirichlet, average, hybrid, BALANCED):.1f} points ahead in balanced accuracy",
        f"DS-FL is ahead by {lead(dirichlet, ds_fl, hybrid):.1f} and "
        f"{lead(dirichlet, ds_fl, hybrid, BALANCED):.1f} points",
    )

    assert [line for line in lines if line not in sentences(FINDING)] == []


def test_scores_on_validation_rows_of_xrays_are_those_of_the_archive(
    results: BenchmarkResults,
) -> None:
    three, one = results.scores["xrays_three"], results.scores["xrays_one"]

    def score(scores: FederationScores, method: str, metric: str = "validation_global") -> str:
        mean = scores.mean(method_row(method), metric)
        assert mean is not None
        return f"{100 * mean:.1f}%"

    lines = (
        f"Hybrid has {score(three, 'hybrid', GLOBAL)} (three architectures) and "
        f"{score(one, 'hybrid', GLOBAL)} (one) on the test, and {score(three, 'hybrid')} and "
        f"{score(one, 'hybrid')} on validation rows",
        f"with {score(three, 'centralized')} and {score(one, 'centralized')}",
        f"FedAvg has {score(one, 'fedavg')} on validation rows",
    )
    assert [line for line in lines if line not in sentences(FINDING)] == []


def test_effects_on_feddf_are_those_of_the_archive(results: BenchmarkResults) -> None:
    def change(name: str) -> str:
        before, after = (
            results.scores[name].mean(("feddf", components), GLOBAL)
            for components in ("none", "all")
        )
        assert before is not None and after is not None
        return f"from {100 * before:.1f}% to {100 * after:.1f}%"

    assert (
        f"{change('fashion_dirichlet')}, and on chest X-rays with one architecture "
        f"{change('xrays_one')}" in sentences(LABEL_SKEW)
    )


def test_figures_of_other_proxy_sets_are_those_of_the_archive(results: BenchmarkResults) -> None:
    scores = results.scores
    hybrid, average = method_row("hybrid"), method_row("fedavg")

    def behind(name: str) -> list[float]:
        distilling = ("fedmd", "feddf", "ds_fl", "hybrid")
        return [lead(scores[name], average, method_row(method)) for method in distilling]

    def percent(name: str, row: tuple[str, str]) -> str:
        mean = scores[name].mean(row, GLOBAL)
        assert mean is not None
        return f"{100 * mean:.1f}"

    fashion, xrays = behind("fashion_shifted_proxy"), behind("xrays_shifted_proxy")
    leads = {
        name: f"{lead(scores[name], hybrid, average):.1f}"
        for name in ("fashion_dirichlet", "fashion_small_proxy", "xrays_one", "xrays_small_proxy")
    }
    local = lead(scores["fashion_shifted_proxy"], method_row("fedmd"), average, LOCAL)
    lines = (
        f"by {min(fashion):.0f} to {max(fashion):.0f} points on Fashion-MNIST and {min(xrays):.0f} "
        f"to {max(xrays):.0f} on the X-rays",
        f"Its lead over FedAvg is {leads['fashion_small_proxy']} points on Fashion-MNIST and "
        f"{leads['xrays_small_proxy']} on the X-rays; with the original proxy sets it is "
        f"{leads['fashion_dirichlet']} and {leads['xrays_one']}",
        f"FedMD is {local:.1f} points ahead on Fashion-MNIST",
        f"is {lead(scores['fashion_no_proxy'], average, hybrid):.1f} points ahead on Fashion-MNIST",
        f"FedAvg is up to {fashion[-1]:.1f} points ahead of Hybrid",
        f"FedAvg has {percent('xrays_no_proxy', average)}%; with the proxy set, Hybrid has "
        f"{percent('xrays_one', hybrid)}%",
        f"({percent('fashion_no_proxy', average)}% and {percent('fashion_dirichlet', hybrid)}%)",
    )
    assert [line for line in lines if line not in sentences(FINDING)] == []
    assert (
        f"is {leads['fashion_small_proxy']} instead of {leads['fashion_dirichlet']} points on "
        f"Fashion-MNIST, and {leads['xrays_small_proxy']} instead of {leads['xrays_one']} on the "
        "X-rays" in sentences(LABEL_SKEW)
    )


def test_numbers_of_training_rows_are_those_of_the_archive(results: BenchmarkResults) -> None:
    def rows(name: str) -> str:
        archive = RunArchive(ROOT / "docs" / "benchmark" / f"{name}.csv")
        totals = [
            sum(client["n_train"] for client in json.loads(run["clients"]).values())
            for run in archive.rows.values()
        ]
        return f"{statistics.fmean(totals):,.0f}"

    fashion = [rows(f"fashion_{name}") for name in ("dirichlet", "small_proxy", "no_proxy")]
    xrays = [rows(f"xrays_{name}") for name in ("one", "small_proxy", "no_proxy")]
    assert (
        f"clients have {fashion[0]} training rows in all with the original proxy set, {fashion[1]} "
        f"with 100 proxy rows and {fashion[2]} without any" in sentences(FINDING)
    )
    assert f"they have {xrays[0]}, {xrays[1]} and {xrays[2]}" in sentences(FINDING)


def test_costs_of_compression_are_those_of_the_archive(results: BenchmarkResults) -> None:
    def changes(suffix: str, methods: Sequence[str]) -> list[float]:
        found = []
        for name, original in (("digits", "digits"), ("fashion", "fashion_dirichlet")):
            for method in methods:
                before = results.scores[original].mean(method_row(method), GLOBAL)
                after = results.scores[f"{name}_{suffix}"].mean(method_row(method), GLOBAL)
                assert before is not None and after is not None
                found.append(100 * (after - before))
        return found

    parameters, predictions = ("fedavg", "feddf", "hybrid"), ("fedmd", "ds_fl")
    eight_bits = max(abs(each) for each in changes("8bit", [*parameters, *predictions]))
    small = [-each for each in changes("small", parameters)]
    lines = (
        f"changes no mean of this table by more than {eight_bits:.1f} points",
        f"costs methods that send parameters {min(small):.0f} to {max(small):.0f} points",
        f"lose at most {-min(changes('small', predictions)):.1f} points",
    )
    assert [line for line in lines if line not in sentences(COMPRESSION)] == []


def test_effect_of_local_epochs_is_that_of_the_measurement() -> None:
    text = (MEASUREMENTS / "local_epochs.txt").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "±" in line]
    gains = {(row[1], row[2]): float(row[4].split()[0]) - float(row[3].split()[0]) for row in rows}
    leads = [row[5] for row in rows if row[2] == "FedDF"]
    gain = gains["Fashion-MNIST, Dirichlet 0.3", "FedDF"]

    line = f"FedDF gains {gain:.1f} points on Fashion-MNIST with Dirichlet partitions"
    assert line in sentences(FINDING)
    gain = gains["Fashion-MNIST, Dirichlet 0.3", "Hybrid"]
    assert f"Hybrid gains {gain:.1f} points there" in sentences(FINDING)
    losses = [-gains["Fashion-MNIST, two classes per client", name] for name in ("FedDF", "DS-FL")]
    assert f"FedDF loses {losses[0]:.1f} and DS-FL {losses[1]:.1f} points" in sentences(FINDING)
    assert len(leads) >= 4 and all("[+" in lead for lead in leads)


def test_effects_in_the_ablation_are_those_of_the_measurement() -> None:
    text = (MEASUREMENTS / "ablation.txt").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    federations, rows = table[0][1:], table[2:]
    assert federations == [
        "Digits, three architectures",
        "Fashion-MNIST, two classes per client",
        "Fashion-MNIST, Dirichlet 0.3",
    ]
    lost = {
        name: [-float(cell.split()[0].replace("−", "-")) for cell in cells] for name, *cells in rows
    }

    def extent(name: str) -> str:
        return f"{min(lost[name]):.1f} to {max(lost[name]):.1f}"

    lines = (
        f"Without the **logit-adjusted loss**, Hybrid loses {extent('logit-adjusted loss')} points",
        f"**contrast-weighted teacher** {extent('contrast-weighted teacher')}",
        f"**replay** {extent('replay at the clients')}",
        f"worth {lost['alignment'][1]:.1f} and {lost['alignment'][2]:.1f} points on Fashion-MNIST",
        f"cost {-lost['recalibrated statistics'][1]:.1f} points with two classes per client",
    )
    assert [line for line in lines if line not in sentences(FINDING)] == []
    assert f"{-lost['recalibrated statistics'][1]:.1f} points in the third" in sentences(LABEL_SKEW)

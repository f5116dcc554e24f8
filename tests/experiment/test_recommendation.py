"""Regions that share vectors of movies: private vectors of users, folders, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hetero_fl
from hetero_fl.data.federated_data import PublicPack
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import UserError
from tests.support.federations import deployed
from tests.support.movielens_folders import write_movielens_folder
from tests.support.payload_search import tapped

CONFIG = Path(__file__).parents[2] / "configs" / "recommendation_hetero.yaml"
REGIONS = ("capital", "coast", "islands", "lakes", "mountains", "plains")
REDUCED = [
    "rounds=2",
    "data.proxy.size=40",
    "data.train_limit=1500",
    "clients.defaults.steps=2",
    "runtime.threads=1",
    "runtime.executor=serial",
]
ITEMS = ("backbone.items.weight", "head.weight", "head.bias")


def reduced(method: str, *overrides: str) -> PreparedRun:
    torch.set_num_threads(1)
    return prepare(CONFIG, [*REDUCED, f"algorithm.name={method}", *overrides])


def run_two_rounds(prepared: PreparedRun) -> FederatedTrainer:
    rounds = prepared.make_trainer()
    for _ in range(2):
        rounds.run_round()
    return rounds


def trained_users(rounds: FederatedTrainer) -> set[bytes]:
    """Return the vectors of users that training has changed, of all regions."""
    found = set()
    for client_id, info in rounds.federation.client_infos.items():
        table = rounds.store.get(client_id).models["model"]["backbone.users.weight"]
        start = rounds.federation.initial_tensors(info.arch)["backbone.users.weight"]
        found |= {row.numpy().tobytes() for row in table[(table != start).any(1)]}
    return found


@pytest.mark.parametrize("method", ["fedavg", "fedmd", "hybrid"])
def test_payloads_contain_no_vectors_of_users(method: str) -> None:
    with tapped() as payloads:
        rounds = run_two_rounds(reduced(method))

    users = trained_users(rounds)
    assert len(users) > 50
    assert not any(user in payload for user in users for payload in payloads)
    assert not any(b"users" in payload for payload in payloads)
    assert method == "fedmd" or any(b"backbone.items.weight" in payload for payload in payloads)


def test_search_finds_vectors_of_users_that_are_shared() -> None:
    with tapped() as payloads:
        run_two_rounds(reduced("fedavg", "clients.defaults.shares=[parameters]"))

    assert any(b"backbone.users.weight" in payload for payload in payloads)


def test_all_regions_have_the_same_vectors_of_movies_after_a_round() -> None:
    prepared = reduced("fedavg")
    rounds = prepared.make_trainer()
    rounds.run_round()

    models = [deployed(rounds, region).models["model"] for region in REGIONS]

    for name in ITEMS:
        assert all(torch.equal(model[name], models[0][name]) for model in models)
    # Regions with the same model share its network, but no vectors of users.
    network = [name for name in models[2] if name.startswith("backbone.network.")]
    assert network and all(torch.equal(models[2][name], models[3][name]) for name in network)
    assert not torch.equal(models[2]["backbone.users.weight"], models[3]["backbone.users.weight"])


def test_secure_aggregation_and_private_uploads_need_no_change() -> None:
    for extra in (
        ["channel.secure_sum={}"],
        ["privacy={unit: client, noise_multiplier: 0.5}"],
    ):
        rounds = reduced("fedavg", *extra).make_trainer()
        rounds.run_round()
        assert rounds.completed == 1


def federation(folder: Path, public: str) -> dict[str, Any]:
    models = ("matrix_factorization", "neural_filtering", "gru4rec")
    return {
        "rounds": 2,
        "data": {
            "name": "movies",
            "path": str(folder),
            "movies": {"length": 5, "groups": 3, "test_movies": 2},
            "partition": {"kind": "natural"},
            "proxy": {"size": 12, "source": {"name": "movies_public", "path": public}},
        },
        "clients": {
            "defaults": {"shares": ["backbone.items.", "head.", "predictions"]},
            "common": ["backbone.items.", "head."],
            "groups": [
                {"name": name, "model": {"name": model, "width": 8}}
                for name, model in zip(("other", "zip_1", "zip_9"), models, strict=True)
            ],
        },
        "algorithm": {"name": "hybrid"},
        "output": {"plots": False},
    }


def test_folder_is_trained_and_another_folder_evaluated(tmp_path: Path) -> None:
    folder = write_movielens_folder(tmp_path / "ml", users=32)

    run = hetero_fl.run(federation(folder, str(folder)), out=tmp_path / "run", quiet=True)

    data = run.summary["data"]
    assert (data["n_proxy"], data["n_test"], data["simulated"]) == (12, 10, False)
    last = run.summary["global"]["last"]
    assert next(iter(last)) == "ndcg_10" and last["hit_rate_10"] is not None
    report = (tmp_path / "run" / "report.html").read_text()
    assert "NDCG@10" in report and "Hit rate@10" in report
    # Another folder has the length of the run's histories, but not its number of groups.
    other = write_movielens_folder(tmp_path / "other", "1m", users=8, seed=3)
    scores = hetero_fl.evaluate(run, str(other))
    assert scores["zip_9"]["ndcg_10"] is not None
    movies = (other / "movies.dat").read_text("latin-1").splitlines()
    (other / "movies.dat").write_text("\n".join(reversed(movies)), encoding="latin-1")
    with pytest.raises(UserError, match=r"the items are in another order than those of the mode"):
        hetero_fl.evaluate(run, str(other))
    assert run.models["zip_9"].task.is_ranking


def test_excluded_movies_reach_clients_of_a_real_federation() -> None:
    data = reduced("fedavg").federation.data
    pack = PublicPack.from_data(data)

    received = PublicPack.decode(pack.encode())

    sent = data.public_sets["common_test"].copy_rows()
    test = received.public["common_test"]
    assert sent.excluded is not None and test.excluded is not None
    assert torch.equal(test.excluded, sent.excluded)
    assert torch.equal(test.baselines["popularity"], sent.baselines["popularity"])
    assert received.content_hash() == pack.content_hash() == data.public_hash()
    received.public["common_test"].excluded = torch.zeros_like(test.excluded)
    assert received.content_hash() != pack.content_hash()


def test_evaluation_leaves_out_excluded_movies() -> None:
    gains = []
    for is_excluded in (True, False):
        prepared = reduced("local")
        data = prepared.federation.data
        sets = [data.public_sets["common_test"], data.client_rows["capital"]["test"]]
        for selection in sets:
            if not is_excluded:
                selection.examples.excluded = None
        rounds = prepared.make_trainer()
        rounds.run_round()
        capital = rounds.evaluate(details=True).clients["capital"]
        assert set(capital.baselines["personal"]) == {"popularity"}
        gains.append([capital.scores[name]["ndcg_10"] for name in ("personal", "global")])

    assert all(a is not None and b is not None and a > b for a, b in zip(*gains, strict=True))


@pytest.mark.parametrize(
    ("settings", "key"), [("public_users: 0.3", "public_users"), ("test_users: 0.3", "test_users")]
)
def test_proxy_set_with_other_roles_of_users_is_refused(settings: str, key: str) -> None:
    source = f"data.proxy.source={{name: movies_public, movies: {{{settings}}}}}"
    same = "data.movies={test_users: 0.15}"
    message = rf"data\.proxy\.source\.movies\.{key}: must be .* as in data\.movies"
    with pytest.raises(UserError, match=message):
        reduced("fedmd", source, same)

"""Hospitals with images, genes or both share the image backbone and upload no gene values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source
from hetero_fl.experiment import PreparedRun, prepare, run
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.utils.errors import UserError
from tests.support.federations import METHODS, deployed, same_bits
from tests.support.payload_search import Found, search_run

CONFIG = Path(__file__).parents[2] / "configs" / "medical_multimodal.yaml"
REDUCED = [
    "rounds=2",
    "data.train_limit=420",
    "data.test_limit=60",
    "data.proxy.size=40",
    "data.partition.min_size=6",
    "clients.defaults.epochs=1",
    "clients.defaults.model.image_width=4",
    "runtime.threads=1",
    "runtime.executor=serial",
]
SUPPORTED = {
    "local",
    "fedavg",
    "fedavg_ft",
    "fedlc",
    "fedprox",
    "scaffold",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedbn",
    "fedper",
    "fedrep",
    "fedbabu",
    "ditto",
    "fedmd",
    "feddf",
    "ds_fl",
    "kt_pfl",
    "fedgen",
    "hybrid",
    "centralized",
    "ensemble",
    "fednova",
    "fedasync",
    "fedbuff",
}
# all other methods need parts that clients do not share, or equal inputs on all clients
REFUSED = ("share", "examples of", "example shape", "algorithm.model")


def reduced(method: str, *overrides: str) -> PreparedRun:
    torch.set_num_threads(1)
    return prepare(CONFIG, [*REDUCED, f"algorithm.name={method}", *overrides])


def leaked(prepared: PreparedRun) -> tuple[int, Found]:
    """Return the number of triples of genes and of their models in the payloads of a run."""
    data = prepared.data
    values = [share.examples.x[:, 784:].numpy() for _, share in data.client_rows.rows_by_location()]
    seen = [
        data.columns(client_id, "train", data.preprocess(client_id))["x"]
        for client_id in prepared.federation.client_infos
    ]
    values += [x.flatten(1)[:, -61:].numpy() for x in seen if x.ndim == 2]
    found = search_run(prepared, lambda name: ".genes." in name, values)
    return found.rows + found.tensors, found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_payloads_contain_no_genes(number: int, subtests: pytest.Subtests) -> None:
    for method in METHODS[number::4]:
        with subtests.test(method=method):
            check_payloads(method)


def check_payloads(method: str) -> None:
    """Check that a method sends no genes, or needs parts that the clients do not share."""
    if method not in SUPPORTED:
        with pytest.raises(UserError) as refused:
            reduced(method)
        assert "\n" not in str(refused.value)
        assert any(word in str(refused.value) for word in REFUSED)
        return
    prepared = reduced(method)
    # A bound has the rows or models of all clients in one place by definition.
    if not prepared.method.needs.all_clients:
        number, found = leaked(prepared)
        assert number == 0 and not found.names("genes")
        assert found.payloads or method == "local"


@pytest.mark.slow
def test_leak_search_finds_shared_gene_models_and_gene_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shares = "clients.defaults.shares=[parameters,predictions]"
    number, found = leaked(reduced("fedavg", shares))
    assert found.names("genes") and number > 1000

    prepared = reduced("fedmd")
    weigh = type(prepared.method).weighted_predictions

    def leak_gene_values(self: Any, client: Any, logits: Any) -> Any:
        item = weigh(self, client, logits)
        x = client.data("train", None)["x"]
        # In a dry run, x has no columns.
        if client.participant_id == "university_1" and x.shape[1]:
            item.values.view(-1)[:10] = x[~(x[:, -1] > 0)][0, 790:800]
        return item

    monkeypatch.setattr(type(prepared.method), "weighted_predictions", leak_gene_values)
    number, found = leaked(prepared)
    assert number == 8 and not found.names("genes")


def test_clients_with_images_share_one_image_backbone() -> None:
    prepared = reduced("fedavg")
    rounds = prepared.make_trainer()
    rounds.run_round()
    ids = list(prepared.federation.client_infos)
    models = {client_id: deployed(rounds, client_id).models["model"] for client_id in ids}
    image = {
        client_id: {n: t for n, t in m.items() if n.startswith("backbone.image.")}
        for client_id, m in models.items()
    }
    with_images = [client_id for client_id in ids if not client_id.startswith("institute")]
    first = image[with_images[0]]
    assert len(with_images) == 5 and first
    assert all(same_bits(image[client_id], first) for client_id in with_images)
    assert not image["institute_1"]
    start = prepared.federation.initial_tensors(
        prepared.federation.client_infos["university_1"].arch
    )
    assert not any(torch.equal(start[n], t) for n, t in first.items() if n.endswith("weight"))
    genes = [
        models[client_id]["backbone.genes.0.weight"]
        for client_id in ids
        if not client_id.startswith("clinic")
    ]
    assert not any(torch.equal(a, b) for i, a in enumerate(genes) for b in genes[:i])


@pytest.mark.slow
def test_clients_without_shared_parameters_train_locally() -> None:
    # institutes share no parameters and cannot use the public images
    trainers = [
        reduced(method, "algorithm.logit_adjustment=false").make_trainer()
        for method in ("local", "hybrid", "fedmd")
    ]
    for rounds in trainers:
        rounds.run_round()
        rounds.run_round()
    for client_id in ("institute_1", "institute_2"):
        alone, *others = (rounds.store.get(client_id).models["model"] for rounds in trainers)
        assert all(same_bits(alone, other) for other in others)


def after_a_round(method: str, shares: str) -> FederatedTrainer:
    """Return a run in which the institutes, which have no images, share something."""
    overrides = [f"clients.groups.2.shares={shares}", "algorithm.teacher=mean"]
    rounds = reduced(method, *overrides).make_trainer()
    rounds.run_round()
    return rounds


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmd", "hybrid"])
def test_consensus_excludes_clients_without_images(method: str) -> None:
    one, other = (after_a_round(method, shares) for shares in ("[]", "[predictions]"))

    assert torch.equal(one.server.state["teacher"], other.server.state["teacher"])


def test_feddf_excludes_models_without_images() -> None:
    one, other = (after_a_round("feddf", shares) for shares in ("[]", "[parameters]"))

    for client_id in ("university_1", "clinic_1"):
        group = one.federation.client_infos[client_id].arch.spec_id
        assert same_bits(one.server.models[group], other.server.models[group])


def test_proxy_set_contains_only_patients_with_images() -> None:
    data = reduced("hybrid").data
    x = data.public_sets["proxy"].copy_rows().x
    assert len(x) == 40 and not x[:, :784].isnan().any() and x[:, 784:].isnan().all()
    private = torch.cat(
        [share.copy_rows().x[:, :784] for _, share in data.client_rows.rows_by_location()]
    )
    private = private[~private[:, 0].isnan()]
    assert (torch.cdist(x[:, :784], private) > 0).all()
    with pytest.raises(
        UserError,
        match=r"data\.proxy\.size: must be < \d+, "
        r"the number of training rows with image",
    ):
        reduced("hybrid", "data.proxy.size=400")


def test_model_blocks_match_the_data_of_the_hospital() -> None:
    archs = {kind.first: kind.arch for kind in reduced("fedavg").federation.client_infos.profiles}
    blocks = {client_id: dict(arch.options)["blocks"] for client_id, arch in archs.items()}
    image, genes = ("image", (1, 28, 28)), ("genes", (60,))
    assert blocks == {"university_1": (image, genes), "clinic_1": (image,), "institute_1": (genes,)}
    assert [arch.input_shape for arch in archs.values()] == [(846,), (1, 28, 28), (61,)]


@pytest.mark.slow
def test_block_dropout_is_equal_in_both_backends(float64: None, tmp_path: Path) -> None:
    common = [*REDUCED, "algorithm.name=hybrid", "output.plots=false", "output.report=false"]

    serial, batched = (
        run(CONFIG, overrides=[*common, f"runtime.executor={executor}"], out=tmp_path / executor)
        for executor in ("serial", "batched")
    )

    assert "cannot be vectorized" not in (batched.path / "log.txt").read_text()
    for client, model in serial.models.items():
        found = batched.models[client].tensors
        torch.testing.assert_close(model.tensors, found, rtol=1e-8, atol=1e-8)


def test_hospitals_have_their_documented_blocks() -> None:
    dataset = load_source(SourceConfig(name="xray_genes"), Path(), missing=True)
    assert (
        dataset.simulated and "simulated" in dataset.about and len(dataset.train.group_names) == 7
    )
    assert dataset.train.group is not None and dataset.test is not None
    image, genes = dataset.train.x[:, :784].isnan(), dataset.train.x[:, 784:].isnan()
    assert torch.equal(image.any(1), image.all(1)) and torch.equal(genes.any(1), genes.all(1))
    for hospital_idx, name in enumerate(dataset.train.group_names):
        in_hospital = dataset.train.group == hospital_idx
        no_image, no_genes = (
            float(missing[in_hospital].any(1).double().mean()) for missing in (image, genes)
        )
        kind = name.split("_")[0]
        assert no_image == (kind == "institute") and (
            0.2 < no_genes < 0.4 if kind == "university" else no_genes == (kind == "clinic")
        )
    assert not dataset.test.x.isnan().any()

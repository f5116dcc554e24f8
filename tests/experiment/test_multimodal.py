"""Hospitals with images, genes or both: what is shared is the image backbone, and no gene ever leaves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hetero_fl.communication.protocol import DirectProtocol
from hetero_fl.config.data import SourceConfig
from hetero_fl.core.payload import Payload
from hetero_fl.data import load_source
from hetero_fl.data.sources.synthetic import HOSPITALS, make_profiles
from hetero_fl.engine.device_memory import DeviceMemory
from hetero_fl.engine.serial import SerialBackend
from hetero_fl.engine.vectorized import VectorizedBackend
from hetero_fl.experiment import PreparedRun, prepare
from hetero_fl.experiment.preparation import load_config
from hetero_fl.federation.client_runtime import ClientRuntime
from hetero_fl.federation.executors.base import InProcessExecutor
from hetero_fl.federation.state_store import StateStore
from hetero_fl.federation.synchronous import SynchronousTrainer
from hetero_fl.federation.trainer import FederatedTrainer, add_evaluation
from hetero_fl.utils.errors import UserError
from tests.federation.test_synchronous import METHODS
from tests.helpers.small_federations import deployed, same_bits

CONFIG = Path(__file__).parents[2] / "configs" / "medical_multimodal.yaml"
REDUCED = [
    "rounds=2", "data.train_limit=420", "data.test_limit=60", "data.proxy.size=40", "data.partition.min_size=6",
    "clients.defaults.epochs=1", "clients.defaults.model.image_width=4", "runtime.threads=1", "runtime.executor=serial",
]  # fmt: skip
RUN = {"local", "fedavg", "fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "fedbn", "fedper", "fedrep", "fedbabu", "ditto",
       "fedmd", "feddf", "ds_fl", "kt_pfl", "fedgen", "hybrid", "centralized", "ensemble",
       "fednova", "fedasync", "fedbuff"}  # fmt: skip
# what it would need stays at home, or is not the same for all
REFUSED = ("share", "examples of", "algorithm.widths")


def reduced(method: str, *overrides: str) -> PreparedRun:
    torch.set_num_threads(1)
    return prepare(CONFIG, [*REDUCED, f"algorithm.name={method}", *overrides])


# What leaves --------------------------------------------------------------------------------------------------------------
def triples(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Every three neighbouring float32 numbers as one hash of 64 bits, but for those with noughts, ones and the like: where
    two are equal it is no accident."""
    found = []
    for array in arrays:
        bits = (
            np.ascontiguousarray(array, dtype=np.float32)
            .reshape(-1)
            .view(np.uint32)
            .astype(np.uint64)
        )
        plain = (bits & np.uint64(0xFFFF)) == 0  # 0, 1, 0.5, infinity
        with np.errstate(over="ignore"):
            mixed = (bits[:-2] * np.uint64(0x9E3779B97F4A7C15)) ^ (
                bits[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F)
            )
            mixed = mixed * np.uint64(0xBF58476D1CE4E5B9) + bits[2:] * np.uint64(0x94D049BB133111EB)
        found.append(mixed[~(plain[:-2] | plain[1:-1] | plain[2:])])
    return np.unique(np.concatenate(found))


def floats_in(data: bytes) -> Iterator[np.ndarray]:
    """The bytes as numbers, at each of the four places where a number may begin."""
    for start in range(4):
        yield np.frombuffer(
            data[start : start + (len(data) - start) // 4 * 4], dtype=np.uint32
        ).view(np.float32)


@contextmanager
def tapped() -> Iterator[set[bytes]]:
    """Every payload that is sent meanwhile, in either direction, as between machines."""
    taken: set[bytes] = set()
    encode = Payload.encode

    def tap(self: Payload) -> bytes:
        data = encode(self)
        taken.add(data)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Payload, "encode", tap)
        encoded = property(lambda self: False, lambda self, value: None)
        for kind in (ClientRuntime, FederatedTrainer):
            patch.setattr(kind, "hands_over", encoded, raising=False)
        yield taken


def genes_of(rounds: SynchronousTrainer) -> list[np.ndarray]:
    """Every tensor of a gene branch, or of what stands in its place, that anybody holds now."""
    held: list[dict[str, Tensor]] = [
        dict(rounds.server.models[slot]) for slot in rounds.server.models
    ]
    for id, card in rounds.federation.client_infos.items():
        held += [dict(tensors) for tensors in rounds.store.get(id).models.values()]
        held.append(dict(rounds.federation.initial_tensors(card.arch)))
    return [t.numpy() for tensors in held for n, t in tensors.items() if ".genes." in n]


def leaked(prepared: PreparedRun) -> tuple[int, bool, int]:
    """How often three numbers of genes, or of gene models, are in what crossed; whether their name is; bytes that crossed."""
    data = prepared.data
    values = [share.examples.x[:, 784:].numpy() for _, share in data.client_rows.rows_by_location()]
    seen = [
        data.columns(id, "train", data.preprocess(id))["x"]
        for id in prepared.federation.client_infos
    ]
    values += [x.flatten(1)[:, -61:].numpy() for x in seen if x.ndim == 2]
    with tapped() as taken:
        rounds = prepared.make_trainer()
        models = genes_of(rounds)
        for _ in range(prepared.config.rounds):
            record = rounds.run_round()
            add_evaluation(record, rounds.evaluate())
            models += genes_of(rounds)
    secret = triples([*values, *models])
    sent = triples(array for payload in taken for array in floats_in(payload))
    return (
        len(np.intersect1d(secret, sent)),
        any(b"genes" in payload for payload in taken),
        sum(map(len, taken)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_no_gene_is_in_any_payload(method: str) -> None:
    try:
        prepared = reduced(method)
    except UserError as error:
        # it would have to share something that stays at home
        assert method not in RUN and "\n" not in str(error)
        assert any(word in str(error) for word in REFUSED), str(error)
        return
    assert method in RUN
    if prepared.method.needs.all_clients:
        return  # a bound, which has everybody's rows or models in one place by its very nature
    found, named, total = leaked(prepared)
    assert not named and found == 0
    assert total > 0 or method == "local"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "hybrid"])
def test_the_search_finds_genes_that_leave(method: str) -> None:
    found, named, _ = leaked(reduced(method, "clients.defaults.shares=[parameters,predictions]"))
    assert named and found > 1000


@pytest.mark.slow
def test_the_search_finds_values(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = reduced("fedmd")
    weigh = type(prepared.method).weighted_predictions

    def careless(self: Any, client: Any, logits: Any) -> Any:
        item = weigh(self, client, logits)
        x = client.data("train", None)["x"]
        if client.participant_id == "university_1" and x.shape[1]:  # not in a dry run
            item.values.view(-1)[:10] = x[~(x[:, -1] > 0)][0, 790:800]
        return item

    monkeypatch.setattr(type(prepared.method), "weighted_predictions", careless)
    found, named, _ = leaked(prepared)
    assert found == 8 and not named


def test_what_is_shared_is_the_same_for_all_who_have_images() -> None:
    prepared = reduced("fedavg")
    rounds = prepared.make_trainer()
    rounds.run_round()
    ids = list(prepared.federation.client_infos)
    models = {id: deployed(rounds, id).models["model"] for id in ids}
    image = {
        id: {n: t for n, t in m.items() if n.startswith("backbone.image.")}
        for id, m in models.items()
    }
    having = [id for id in ids if not id.startswith("institute")]
    first = image[having[0]]
    assert len(having) == 5 and first
    for id in having[1:]:
        assert image[id].keys() == first.keys() and all(
            torch.equal(image[id][n], t) for n, t in first.items()
        )
    assert not image["institute_1"]
    start = prepared.federation.initial_tensors(
        prepared.federation.client_infos["university_1"].arch
    )
    assert not any(torch.equal(start[n], t) for n, t in first.items() if n.endswith("weight"))
    genes = [models[id]["backbone.genes.0.weight"] for id in ids if not id.startswith("clinic")]
    assert not any(torch.equal(a, b) for i, a in enumerate(genes) for b in genes[:i])


@pytest.mark.slow
def test_institutes_go_their_own_way() -> None:
    """Nothing of theirs is shared, and they see nothing of the public images: as without a federation."""
    ways = [
        reduced(method, "algorithm.logit_adjustment=false").make_trainer()
        for method in ("local", "hybrid", "fedmd")
    ]
    for rounds in ways:
        rounds.run_round()
        rounds.run_round()
    for id in ("institute_1", "institute_2"):
        alone, *others = (rounds.store.get(id).models["model"] for rounds in ways)
        for other in others:
            assert alone.keys() == other.keys() and all(
                torch.equal(t, other[n]) for n, t in alone.items()
            )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmd", "hybrid"])
def test_who_sees_nothing_of_the_public_images_has_no_word_in_the_consensus(method: str) -> None:
    silent, willing = (
        reduced(
            method, f"clients.groups.2.shares={shares}", "algorithm.teacher=mean"
        ).make_trainer()
        for shares in ("[]", "[predictions]")
    )
    silent.run_round()
    willing.run_round()
    assert torch.equal(silent.server.state["teacher"], willing.server.state["teacher"])


def test_feddf_gives_no_voice_to_models_that_see_nothing_of_the_public_images() -> None:
    silent, willing = (
        reduced(
            "feddf", f"clients.groups.2.shares={shares}", "algorithm.teacher=mean"
        ).make_trainer()
        for shares in ("[]", "[parameters]")
    )
    silent.run_round()
    willing.run_round()

    seeing = [
        silent.federation.client_infos[id].arch.spec_id for id in ("university_1", "clinic_1")
    ]
    for group in seeing:
        assert same_bits(silent.server.models[group], willing.server.models[group])


def test_public_images_are_those_of_patients_who_have_one() -> None:
    data = reduced("hybrid").data
    x = data.public_sets["proxy"].copy_rows().x
    assert len(x) == 40 and not x[:, :784].isnan().any() and x[:, 784:].isnan().all()
    private = torch.cat(
        [share.copy_rows().x[:, :784] for _, share in data.client_rows.rows_by_location()]
    )
    private = private[~private[:, 0].isnan()]
    assert (torch.cdist(x[:, :784], private) > 0).all()  # nobody's own
    with pytest.raises(
        UserError,
        match=r"data\.proxy\.size: must be < \d+, the number of training rows of xray_genes with image",
    ):
        reduced("hybrid", "data.proxy.size=400")


def test_a_model_is_told_what_its_hospital_sees() -> None:
    archs = {kind.first: kind.arch for kind in reduced("fedavg").federation.client_infos.profiles}
    blocks = {id: dict(arch.options)["blocks"] for id, arch in archs.items()}
    image, genes = ("image", (1, 28, 28)), ("genes", (60,))
    assert blocks == {"university_1": (image, genes), "clinic_1": (image,), "institute_1": (genes,)}
    assert [arch.input_shape for arch in archs.values()] == [(846,), (1, 28, 28), (61,)]


def test_parts_that_may_leave() -> None:
    with pytest.raises(
        UserError,
        match=r"shares: no model has a tensor with prefix 'backbone\.imag\.'; did you mean 'backbone.image.'",
    ):
        reduced("fedavg", "clients.defaults.shares=[backbone.imag.]")
    with pytest.raises(
        UserError,
        match=r"'backbone' and 'backbone\.image\.' exclude each other",
    ):
        load_config(CONFIG, ["clients.defaults.shares=[backbone,backbone.image.]"])
    with pytest.raises(UserError, match="unknown value 'backbones'; did you mean 'backbone'"):
        load_config(CONFIG, ["clients.defaults.shares=[backbones]"])


@pytest.mark.slow
def test_hiding_blocks_is_the_same_in_lockstep() -> None:
    """Batched and serial runs, in which the draws of dropout are keyed."""
    torch.set_default_dtype(torch.float64)
    try:
        said: list[str] = []
        ways = []
        for performer in (
            SerialBackend(DeviceMemory(torch.device("cpu"))),
            VectorizedBackend(DeviceMemory(torch.device("cpu")), said.append),
        ):
            prepared = reduced("hybrid")
            site = ClientRuntime(
                prepared.method, prepared.federation, StateStore(), performer, DirectProtocol()
            )
            rounds = SynchronousTrainer(
                prepared.method, prepared.federation, InProcessExecutor(site, chunk=100)
            )
            rounds.run_round()
            rounds.run_round()
            ways.append(
                {
                    id: rounds.store.get(id).models["model"]
                    for id in prepared.federation.client_infos
                }
            )
        assert said == [] and ways[0].keys() == ways[1].keys()
        for id, tensors in ways[0].items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, ways[1][id][name], rtol=1e-8, atol=1e-8)
    finally:
        torch.set_default_dtype(torch.float32)


# The data -----------------------------------------------------------------------------------------------------------------
def test_who_has_what() -> None:
    dataset = load_source(SourceConfig(name="xray_genes"), Path(), missing=True)
    assert (
        dataset.simulated
        and "generated" in dataset.about
        and dataset.train.group_names == tuple(HOSPITALS)
    )
    assert dataset.train.group is not None and dataset.test is not None
    image, genes = dataset.train.x[:, :784].isnan(), dataset.train.x[:, 784:].isnan()
    assert torch.equal(image.any(1), image.all(1)) and torch.equal(genes.any(1), genes.all(1))
    for place, name in enumerate(HOSPITALS):
        mine = dataset.train.group == place
        no_image, no_genes = (float(gone[mine].any(1).double().mean()) for gone in (image, genes))
        kind = name.split("_")[0]
        assert no_image == (kind == "institute") and (
            0.2 < no_genes < 0.4 if kind == "university" else no_genes == (kind == "clinic")
        )
    assert not dataset.test.x.isnan().any()


def test_profiles_are_the_patients_own() -> None:
    y = torch.arange(40) % 2
    laboratory = torch.arange(40) % 8
    whole = make_profiles(y, laboratory, "train")
    assert torch.equal(make_profiles(y[:7], laboratory[:7], "train"), whole[:7])
    assert not torch.equal(make_profiles(y, laboratory, "test"), whole)


def test_profiles_have_the_structure_that_is_documented() -> None:
    y, rows = torch.arange(8000) % 2, torch.arange(8000)
    profiles = make_profiles(y, (rows // 2) % 8, "train").double()
    by_laboratory = torch.stack([profiles[(rows // 2) % 8 == h].mean(0) for h in range(8)])
    assert 0.4 < float((by_laboratory - by_laboratory.mean(0)).std()) < 0.6  # the batch effect
    rest = profiles - by_laboratory[(rows // 2) % 8]
    spread = torch.linalg.svdvals(rest - rest.mean(0)) / len(rest) ** 0.5
    # eight pathways above the noise
    assert spread[7] > 1.4 * spread[8] and spread[8] < 1.3 * spread[-1]
    shift = rest[y == 1].mean(0) - rest[y == 0].mean(0)
    assert shift.norm() > 1

"""Label counts are read only if they are used, because reading them may spend privacy budget."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hetero_fl.algorithms.distillation import COUNTS
from hetero_fl.algorithms.heterofl import HeteroFL
from hetero_fl.algorithms.hybrid import FedDF
from hetero_fl.algorithms.prediction import add_log_prior, subtract_log_prior
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.participant import Participant
from hetero_fl.core.payload import Payload
from hetero_fl.core.task import Task
from hetero_fl.engine.driver import run_plan
from tests.references.local_training import clients
from tests.support.federations import config, rounds_of

LOGITS = torch.zeros(4, 3)


def client_of(kind: Any, **settings: Any) -> Participant:
    """Return a client whose label counts must not be read."""

    def counts() -> torch.Tensor:
        raise AssertionError("label counts were read")

    models = {"model": {"head.weight": torch.zeros(3, 2), "head.bias": torch.zeros(3)}}
    settings_object = ClientSettings(**settings)
    return Participant("a", Task(kind, 3), {}, models, None, settings_object, counts)


def test_tasks_without_class_prior_do_not_read_counts() -> None:
    for kind in ("multilabel", "regression"):
        client = client_of(kind, logit_adjustment=True, prior_correction=True)

        assert add_log_prior(client, LOGITS) is LOGITS
        assert subtract_log_prior(client, LOGITS) is LOGITS
        assert FedDF(teacher="contrast").weighted_predictions(client, LOGITS).values is LOGITS
        assert not FedDF(teacher="contrast", align=1.0).needs_counts(client)


def test_counts_that_are_not_shared_are_not_read() -> None:
    client = client_of("multiclass", shares=["parameters", "predictions"])

    assert HeteroFL(masked=True).present_classes(client).tolist() == [1.0, 1.0, 1.0]
    FedDF(teacher="contrast").weighted_predictions(client, LOGITS)


def test_settings_that_use_counts_read_them() -> None:
    client = client_of("multiclass", logit_adjustment=True, prior_correction=True)

    for read in (
        lambda: add_log_prior(client, LOGITS),
        lambda: subtract_log_prior(client, LOGITS),
        lambda: FedDF(teacher="contrast").weighted_predictions(client, LOGITS),
        lambda: HeteroFL(masked=True).present_classes(client),
    ):
        with pytest.raises(AssertionError, match="label counts were read"):
            read()


def test_counts_are_uploaded_by_clients_that_contribute_to_the_teacher() -> None:
    for teacher, has_proxy in itertools.product(("mean", "contrast"), (False, True)):
        settings = {"name": "feddf", "teacher": teacher, "align": 1.0}
        rounds = rounds_of(config("feddf", clients=2, algorithm=settings), num_rounds=0)
        rounds.set_round(0)
        client = clients(rounds)["site_1"]
        client.has_proxy = has_proxy
        client_info = rounds.federation.client_infos["site_1"]
        received = Payload(rounds.algorithm.broadcast(rounds.server, client_info))

        items, _ = run_plan(client, rounds.algorithm.train(client, received), rounds.backend)

        assert "model" in items and (COUNTS in items) == has_proxy

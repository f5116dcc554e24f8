"""Plans carried out without computing: what a client would send, known before anybody trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hetero_fl.algorithms import Algorithm
from hetero_fl.core.participant import ClientInfo, Columns, Participant
from hetero_fl.core.payload import Item, Payload, PayloadError, report_with_loss
from hetero_fl.core.plan import ClassSums, Fit, FitReport, Predict, Step
from hetero_fl.engine.driver import Work, reported_loss, run_plan
from hetero_fl.engine.templates import Templates
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.federation.user_methods import is_user_method
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.client import ClientPrivacy, upload_specs
from hetero_fl.utils.errors import UserError

MOST_ZEROS = 2**24  # so many are tensors of their own, in which a method may write


class DryRunBackend:
    """A backend that answers every step with a result of the right shape: fits change nothing, predictions are nought.

    Large results have one number in memory, whatever their shape: how many rows a client has is what it tells.
    """

    def __init__(self) -> None:
        self.templates = Templates(torch.device("cpu"))

    def run(self, work: Work) -> list[Any]:
        """Results of the right shapes, in order."""
        return [self._result_of_shape(participant, step) for participant, step in work]

    def _result_of_shape(self, participant: Participant, step: Step) -> Any:
        if isinstance(step, Fit):
            return FitReport(1, step.batch_size, 0.0)
        arch = getattr(step, "arch", None) or participant.arch[step.slot]
        width = (
            arch.outputs if step.readout != "features" else self.templates(arch).module.feature_dim
        )
        if isinstance(step, Predict):
            return compact_zeros(len(step.data.columns(participant)["x"]), int(width))
        assert isinstance(step, ClassSums)
        classes = participant.task.outputs
        return torch.zeros(classes, int(width)), torch.zeros(classes)


class PlaceholderClient(Participant):
    """A client of whom only the form is known; it notes whether its label counts are asked for."""

    counts_accessed = False

    def __getattribute__(self, name: str) -> Any:
        if name == "counts":
            self.counts_accessed = True
        return super().__getattribute__(name)


class ExpectedUploads:
    """What each client's upload must look like: names, shapes and dtypes, from a dry run of its plan on its broadcast."""

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.backend = DryRunBackend()
        self.specs = upload_specs(algorithm, federation)
        self.privacy = ClientPrivacy.from_federation(algorithm, federation)
        self._known: dict[Any, dict[str, Item]] = {}

    def expected_items(
        self, client_info: ClientInfo, broadcast: Payload, round_idx: int
    ) -> Mapping[str, Item]:
        """An upload of the right form; its numbers mean nothing. Clients alike share one.

        Raises UserError if the method's `train` returns what it did not declare, or if there is no memory for an upload.
        """
        s = client_info.settings
        own_rows = any(spec.rows_of == "train" for spec in self.algorithm.uploads.values())
        phase = self.upload_phase(s.share_every, round_idx)
        shares = (tuple(s.shares), s.share_every, client_info.has_proxy)
        key = (
            client_info.arch,
            shares,
            phase,
            _payload_structure(broadcast),
            client_info.num_rows if own_rows else None,
        )
        if key not in self._known:
            # may differ in every round: the last round's are of no more use
            if is_user_method(self.algorithm):
                self._known = {k: v for k, v in self._known.items() if k[2] == key[2]}
            try:
                upload = self.expected_payload(client_info, broadcast, round_idx)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "alloc" not in str(error):
                    raise
                raise UserError(
                    f"{client_info.client_id}: an upload for {client_info.num_rows:,} rows takes more memory than there is"
                ) from None
            self._known[key] = {n: upload.item(n) for n in upload}
        return self._known[key]

    def trained_names(self, client_info: ClientInfo, item: str) -> frozenset[str]:
        """Names of the parameters of the model that an item of this client's holds: that of the slot of its name, or its own."""
        return (
            self.algorithm.extra_models(client_info.arch)
            .get(item, client_info.arch)
            .parameter_names
        )

    def upload_phase(self, share_every: int, round_idx: int) -> int:
        """What of the round a client's plan may depend on in form; of an own method's nothing is known."""
        return (
            round_idx
            if is_user_method(self.algorithm)
            else self.algorithm.upload_phase(share_every, round_idx, self.federation.num_rounds)
        )

    def expected_payload(
        self, client_info: ClientInfo, broadcast: Payload, round_idx: int
    ) -> Payload:
        """An upload as long as the real one, report included. Raises UserError as `of` does."""
        return self.dry_run_upload(client_info, broadcast, round_idx)[0]

    def dry_run_upload(
        self, client_info: ClientInfo, broadcast: Payload, round_idx: int
    ) -> tuple[Payload, tuple[PrivacyCharge, ...]]:
        """Such an upload, and what making it costs of the client's privacy."""
        client = self.placeholder_client(client_info, round_idx)
        ledger = self.privacy.make_ledger(self.backend) if self.privacy is not None else None
        plan = self.algorithm.train(client, broadcast)
        items, reports = run_plan(plan, client, ledger or self.backend)
        try:
            upload = Payload.from_hook(items, self.algorithm.uploads)
            if self.privacy is not None:
                upload = self.privacy.release_upload(client, upload, broadcast)
        except PayloadError as error:
            raise UserError(f"{type(self.algorithm).__name__}.train: {error}") from None
        if self.privacy is None:
            upload.report = report_with_loss(reported_loss(reports))
            return upload, ()
        steps = ledger.charges[client_info.client_id] if ledger is not None else []
        return upload, self.privacy.charges(steps, client.counts_accessed, bool(upload))

    def placeholder_client(self, client_info: ClientInfo, round_idx: int) -> PlaceholderClient:
        """A client as the server may imagine it: the public rows are real, the private ones are only counted."""
        federation = self.federation

        def data(name: str, through: Any) -> Columns:
            if name == "proxy":
                return federation.data.columns(
                    client_info.client_id, name, through or client_info.preprocess
                )
            return {
                "x": torch.empty(client_info.num_rows, 0),
                "y": compact_zeros(client_info.num_rows, dtype=torch.int64),
            }

        return PlaceholderClient(
            participant_id=client_info.client_id,
            task=federation.task,
            arch={"model": client_info.arch},
            models={"model": dict(federation.initial_tensors(client_info.arch))},
            data=data,
            settings=client_info.settings,
            counts=torch.zeros(federation.task.outputs),
            num_rows=client_info.num_rows,
            has_proxy=federation.data.has_proxy(client_info.preprocess),
            peers=federation.client_infos,
            round_context=federation.round_context(round_idx),
        )


def compact_zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros of that shape; if there are many, all of them are one number in memory, and nothing can be written there."""
    if math.prod(shape) <= MOST_ZEROS:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros((), dtype=dtype).expand(shape)


def _payload_structure(payload: Payload) -> tuple[Any, ...]:
    def shape(values: Any) -> Any:
        return tuple(values.shape) if isinstance(values, torch.Tensor) else len(values)

    return tuple((n, shape(payload[n])) for n in payload)

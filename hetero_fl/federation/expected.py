"""Expected uploads, which dry runs of plans determine.

A dry run executes the hooks of a method with a backend that computes nothing. The structure of an
upload consists of the names, shapes and dtypes of the items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import call_broadcast, is_user_method
from hetero_fl.algorithms.round_parts import describe_unshared, upload_phase
from hetero_fl.core.participant import ClientInfo, Columns, Participant
from hetero_fl.core.payload import Item, Payload, PayloadError, report_with_loss
from hetero_fl.core.plan import (
    ClassSums,
    Fit,
    FitReport,
    Predict,
    Recalibrate,
    SampledBatches,
    Step,
    StepKey,
    record_steps,
)
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.engine.driver import Backend, Work, reported_loss, run_plan
from hetero_fl.engine.templates import (
    Templates,
    example_flops,
    forward_flops,
    has_batch_norm,
    step_model_spec,
)
from hetero_fl.engine.training import step_count
from hetero_fl.federation.channel import FederationLinks
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.client_side import ClientPrivacy, upload_specs
from hetero_fl.utils.caching import IdentityCache
from hetero_fl.utils.errors import UserError

# Number of elements up to which `compact_zeros` returns an ordinary, writable tensor.
MAX_DENSE_ZEROS = 2**24
# Number of expected uploads whose size is cached.
CACHED_SIZES = 64


class DryRunBackend:
    """Backend that returns placeholders of the right shapes instead of computing steps.

    A large result takes the memory of a single element, because the number of rows is reported by
    clients and cannot be trusted.

    Attributes:
        templates: Modules, keyed by architecture.
        computed: Keys of the steps for which a placeholder has been returned.
        operations: Number of floating-point operations of these steps (see `step_flops`).
    """

    def __init__(self) -> None:
        self.templates = Templates(DeviceMemory(CPU))
        self.computed: set[StepKey] = set()
        self.operations = 0

    def run(self, work: Work) -> list[Any]:
        """Return a placeholder for the result of each step, in order."""
        self.computed.update(step.key for _, step in work)
        self.operations += sum(step_flops(participant, step) for participant, step in work)
        return [self._result_of_shape(participant, step) for participant, step in work]

    def _result_of_shape(self, participant: Participant, step: Step) -> Any:
        if isinstance(step, Fit):
            return FitReport(1, step.batch_size, 0.0)
        if isinstance(step, Recalibrate):
            return {}
        arch = step_model_spec(participant, step)
        width = (
            arch.outputs if step.readout != "features" else self.templates(arch).module.num_features
        )
        if isinstance(step, Predict):
            return compact_zeros(len(step.data.columns(participant)["x"]), int(width))
        assert isinstance(step, ClassSums)
        classes = participant.task.outputs
        return torch.zeros(classes, int(width)), torch.zeros(classes)


def step_flops(participant: Participant, step: Step) -> int:
    """Count the floating-point operations of a step as examples times operations per example.

    Training a model on an example counts as three forward passes, because the backward pass takes
    about twice the operations of the forward pass. Models that an objective uses without training
    them, predictions and recalibrations count as one forward pass. The loss, the optimizer and
    aggregation are not counted.

    Args:
        participant: The participant that computes the step.
        step: The step.
    """
    if not isinstance(step, Fit):
        arch = step_model_spec(participant, step)
        if isinstance(step, Recalibrate) and not has_batch_norm(arch):
            return 0
        return len(step.data.columns(participant)["x"]) * forward_flops(arch)
    trained = sum(example_flops(participant.arch[slot]) for slot in step.train)
    frozen = sum(forward_flops(participant.arch[slot]) for slot in step.frozen)
    num_steps, num_examples = _fit_size(participant, step)
    extra = num_steps * sum(draws.size for draws in step.extra_batches.values())
    return num_examples * (trained + frozen) + extra * trained


def _fit_size(participant: Participant, fit: Fit) -> tuple[int, int]:
    """Return the number of steps and the total number of examples of a fit."""
    if isinstance(fit.data, SampledBatches):
        num_steps = step_count(fit.data.size, fit)
        return num_steps, num_steps * fit.data.size
    num_rows = len(next(iter(fit.data.columns(participant).values())))
    # A dry run has no class means of the clients.
    num_steps = step_count(num_rows, fit) if num_rows else 0
    if fit.steps is None:
        return num_steps, fit.epochs * num_rows
    return num_steps, num_steps * min(fit.batch_size, num_rows)


class PlaceholderClient(Participant):
    """Client with placeholders instead of private data.

    Attributes:
        counts_accessed: Whether a plan has read the label counts.
    """

    counts_accessed = False

    @property
    @override
    def counts(self) -> Tensor:
        """Zeros in place of the label counts. The access is recorded."""
        self.counts_accessed = True
        return self.label_counts()


class ExpectedUploads:
    """Expected structure of uploads: the names, shapes and dtypes of the items.

    The structure of a client's upload is determined by a dry run of the client's plan.

    Args:
        algorithm: The method.
        federation: The federation.

    Attributes:
        is_user_method: Whether the method is defined outside this package.
        backend: The backend of the dry runs.
        specs: Declarations of the uploaded items, keyed by name.
        privacy: Client side of differential privacy, or None if the run is not private.
        intervals: Values of the clients' setting `share_every`, in ascending order.
        links: Links that encode each message with the maximum size of messages of its shapes.
    """

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.is_user_method = is_user_method(algorithm)
        self.backend = DryRunBackend()
        self.specs = upload_specs(algorithm, federation)
        self.privacy = ClientPrivacy.from_federation(algorithm, federation)
        profiles = federation.client_infos.profiles
        self.intervals = sorted({profile.settings.share_every for profile in profiles})
        self.links = FederationLinks(algorithm, federation, bound=True)
        self._known: dict[Any, dict[str, Item]] = {}
        # Clients with uploads of the same structure share the dictionary of expected items.
        self._sizes: IdentityCache[int] = IdentityCache(CACHED_SIZES)

    @cached_property
    def server(self) -> Participant:
        """The sender of the expected broadcasts, which is in its initial state at first."""
        return initial_server(self.algorithm, self.federation)

    def broadcast(self, client_info: ClientInfo, round_idx: int) -> Payload:
        """Return the broadcast of `server` to a client in a round."""
        self.server.round_context = self.federation.round_context(round_idx)
        self.server.stream_uses = {}
        return call_broadcast(self.algorithm, self.server, client_info)

    def expected_items(
        self, client_info: ClientInfo, broadcast: Payload, round_idx: int
    ) -> Mapping[str, Item]:
        """Return the expected items of a client's upload, with placeholder values.

        Args:
            client_info: The client.
            broadcast: The broadcast on which the client trains.
            round_idx: Index of the round, from 0.

        Returns:
            Items, keyed by name. The same object is returned for uploads of the same structure.

        Raises:
            UserError: If the method's `train` returns undeclared items, or if an upload does not
                fit into memory.
        """
        s = client_info.settings
        has_train_rows = any(spec.rows_of == "train" for spec in self.algorithm.uploads.values())
        phase = self.upload_phase(s.share_every, round_idx)
        shares = (tuple(s.shares), s.share_every, client_info.has_proxy)
        key = (
            tuple(sorted(client_info.models.items())),
            shares,
            phase,
            payload_structure(broadcast),
            client_info.num_rows if has_train_rows else None,
        )
        if key not in self._known:
            # Uploads of a user-defined method may differ in every round, so entries of other rounds
            # are dropped.
            if self.is_user_method:
                self._known = {k: v for k, v in self._known.items() if k[2] == key[2]}
            try:
                # The rows and models of a dry run are on the CPU.
                upload, _ = self.dry_run_upload(client_info, broadcast.to(CPU), round_idx)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "alloc" not in str(error):
                    raise
                raise UserError(
                    f"{client_info.client_id}: not enough memory for an upload of "
                    f"{client_info.num_rows:,} rows"
                ) from None
            self._known[key] = {n: upload.item(n) for n in upload}
        return self._known[key]

    def expected_size(self, client_info: ClientInfo, broadcast: Payload, round_idx: int) -> int:
        """Return the expected size of a client's upload in bytes, including the report.

        The size can differ from the real size by the number of digits of weights. If the
        compression depends on values, the maximum size is returned.

        Args:
            client_info: The client.
            broadcast: The broadcast on which the client trains.
            round_idx: Index of the round, from 0.
        """
        items = self.expected_items(client_info, broadcast, round_idx)

        def measure() -> int:
            upload = Payload(dict(items), report_with_loss(0.0))
            return self.encoded_size(client_info, upload, broadcast, round_idx)

        return self._sizes.get(items, measure)

    def encoded_size(
        self, client_info: ClientInfo, upload: Payload, broadcast: Payload, round_idx: int
    ) -> int:
        """Return the maximum number of bytes of an encoded upload with the shapes of `upload`."""
        if self.links.up is None:
            return upload.encoded_size
        return len(self.links.encode_upload(client_info, round_idx, upload, broadcast, {}))

    def trained_names(self, client_info: ClientInfo, item: str) -> frozenset[str]:
        """Return the names of the trained parameters in an item that contains a model.

        If the client has a model named `item`, the names of the parameters of this model are
        returned. Otherwise, the names of the parameters of the client's main model are returned.
        """
        return client_info.models.get(item, client_info.arch).parameter_names

    def upload_phase(self, share_every: int, round_idx: int) -> int:
        """Return the number of the phase to which a round belongs.

        Uploads have the same structure in all rounds of a phase. With a user-defined method, each
        round is a separate phase.

        Args:
            share_every: Number of rounds between uploads of the client.
            round_idx: Index of the round, from 0.
        """
        if self.is_user_method:
            return round_idx
        return upload_phase(self.algorithm, share_every, round_idx, self.federation.num_rounds)

    def round_phase(self, round_idx: int) -> tuple[int, ...]:
        """Return the phase of a round for each of the `intervals`."""
        return tuple(self.upload_phase(interval, round_idx) for interval in self.intervals)

    def dry_run_upload(
        self, client_info: ClientInfo, broadcast: Payload, round_idx: int
    ) -> tuple[Payload, tuple[PrivacyCharge, ...]]:
        """Run the training plan of a client without computation, and return the upload.

        Args:
            client_info: The client.
            broadcast: The broadcast on which the client trains.
            round_idx: Index of the round, from 0.

        Returns:
            An upload with the same structure and report entries as the real upload, and the privacy
            charges.

        Raises:
            UserError: If the method's `train` returns items that are not declared or that the
                client does not share, or creates a step without yielding the step.
        """
        client = self.placeholder_client(client_info, round_idx)
        if self.is_user_method:
            # The server shares these tensors, and the hook may modify them in place.
            broadcast = deepcopy(broadcast)
        charges: list[PrivacyCharge] = []
        backend: Backend = self.backend
        if self.privacy is not None:
            backend = self.privacy.charge_steps(backend, charges)
        with record_steps() as created:
            plan = self.algorithm.train(client, broadcast)
            items, reports = run_plan(client, plan, backend)
        self.check_yields("train", created)
        try:
            upload = Payload.from_hook(items, self.algorithm.uploads)
            self._check_shares(client_info, upload)
            if self.privacy is not None:
                upload = self.privacy.release_upload(client, upload, broadcast)
        except PayloadError as error:
            raise UserError(f"{type(self.algorithm).__name__}.train: {error}") from None
        if self.privacy is None:
            upload.report = report_with_loss(reported_loss(reports), client.logged)
            return upload, ()
        return upload, self.privacy.charges(charges, client.counts_accessed, bool(upload))

    def _check_shares(self, client_info: ClientInfo, upload: Payload) -> None:
        shares = client_info.settings.shares
        if unshared := describe_unshared(upload.items_by_name, self.algorithm.uploads, shares):
            raise UserError(
                f"{type(self.algorithm).__name__}.train: {unshared}, but {client_info.client_id} "
                f"shares {', '.join(shares) or 'nothing'}; "
                "check `may_share` before creating the item"
            )

    def check_yields(self, hook: str, created: Mapping[StepKey, Step]) -> None:
        """Check that a user-defined hook has yielded all steps that the hook created.

        Methods of this package are not checked.

        Args:
            hook: Name of the hook, for the error message.
            created: The created steps (see `record_steps`).

        Raises:
            UserError: If a step is created but not yielded.
        """
        unused = [step for key, step in created.items() if key not in self.backend.computed]
        self.backend.computed.clear()
        if unused and self.is_user_method:
            raise UserError(
                f"{type(self.algorithm).__name__}.{hook}: a {type(unused[0]).__name__} is created "
                "but never yielded and has no effect; write `yield` before it"
            )

    def placeholder_client(self, client_info: ClientInfo, round_idx: int) -> PlaceholderClient:
        """Create a client with the real proxy rows, and placeholders for the private rows."""
        federation = self.federation

        def data(name: str, preprocess: Any) -> Columns:
            if name == "proxy":
                return federation.data.columns(
                    client_info.client_id, name, preprocess or client_info.preprocess
                )
            return {
                "x": torch.empty(client_info.num_rows, 0),
                "y": compact_zeros(client_info.num_rows, dtype=torch.int64),
            }

        return PlaceholderClient(
            participant_id=client_info.client_id,
            task=federation.task,
            arch=dict(client_info.models),
            models={
                slot: dict(federation.initial_tensors(arch))
                for slot, arch in client_info.models.items()
            },
            data=data,
            settings=client_info.settings,
            label_counts=lambda: torch.zeros(federation.task.outputs),
            num_rows=client_info.num_rows,
            has_proxy=federation.data.has_proxy(client_info.preprocess),
            peers=federation.client_infos,
            round_context=federation.round_context(round_idx),
        )


def initial_server(
    algorithm: Algorithm, federation: FederationSpec, round_idx: int = 0
) -> Participant:
    """Return the server in its initial state, in a round."""
    server = federation.server()
    server.round_context = federation.round_context(round_idx)
    algorithm.setup(server)
    return server


def compact_zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of zeros.

    If the tensor has more than `MAX_DENSE_ZEROS` elements, all elements share the memory of one
    element, and the tensor must not be modified in place.
    """
    if math.prod(shape) <= MAX_DENSE_ZEROS:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros((), dtype=dtype).expand(shape)


def payload_structure(payload: Payload) -> tuple[Any, ...]:
    """Return the name of each item, and the shape of the tensor or the number of named tensors."""
    return tuple(
        (name, tuple(values.shape) if isinstance(values, Tensor) else len(values))
        for name, values in payload.items()
    )

"""Plans carried out without computing: what a client would send, known before anybody trains."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from types import FunctionType, GeneratorType
from typing import Any

import torch
from torch import Tensor

from hetero_fl.aggregation.uploads import Upload, Uploads
from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import (
    call_broadcast,
    describe_unshared,
    is_user_method,
    upload_phase,
)
from hetero_fl.core.participant import ClientInfo, Columns, Participant
from hetero_fl.core.payload import Item, Payload, PayloadError, report_with_loss
from hetero_fl.core.plan import ClassSums, Fit, FitReport, Predict, Step, StepKey, record_steps
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.engine.driver import Work, reported_loss, run_plan, translate_user_errors
from hetero_fl.engine.templates import Templates
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.client_side import ClientPrivacy, upload_specs
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key

NEARLY = 0.88  # likeness from which a name is a misspelt hook: `agregate`, but not `deployed`
MOST_ZEROS = 2**24  # so many are tensors of their own, in which a method may write


class DryRunBackend:
    """A backend that answers every step with a result of the right shape: fits change nothing, predictions are nought.

    Large results have one number in memory, whatever their shape: how many rows a client has is what it tells.
    """

    def __init__(self) -> None:
        self.templates = Templates(DeviceMemory(CPU))
        self.computed: set[StepKey] = set()

    def run(self, work: Work) -> list[Any]:
        """Return results of the right shapes, in order."""
        self.computed.update(step.key for _, step in work)
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

    def read_counts(self) -> Tensor:
        """Return zeros in place of the label counts."""
        self.counts_accessed = True
        return torch.zeros(self.task.outputs)


class ExpectedUploads:
    """What each client's upload must look like: names, shapes and dtypes, from a dry run of its plan on its broadcast."""

    def __init__(self, algorithm: Algorithm, federation: FederationSpec) -> None:
        self.algorithm = algorithm
        self.federation = federation
        self.is_user_method = is_user_method(algorithm)
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
            tuple(sorted(client_info.models.items())),
            shares,
            phase,
            payload_structure(broadcast),
            client_info.num_rows if own_rows else None,
        )
        if key not in self._known:
            # may differ in every round: the last round's are of no more use
            if self.is_user_method:
                self._known = {k: v for k, v in self._known.items() if k[2] == key[2]}
            try:
                # on the CPU, as the rows and models of a dry run
                upload, _ = self.dry_run_upload(client_info, broadcast.to(CPU), round_idx)
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
        return client_info.models.get(item, client_info.arch).parameter_names

    def upload_phase(self, share_every: int, round_idx: int) -> int:
        """Return what of the round decides the form of a client's upload.

        That of a user's method may differ in every round.
        """
        if self.is_user_method:
            return round_idx
        return upload_phase(self.algorithm, share_every, round_idx, self.federation.num_rounds)

    def round_phase(self, round_idx: int) -> tuple[int, ...]:
        """Return the upload phase of each `share_every` that clients of the federation have."""
        profiles = self.federation.client_infos.profiles
        intervals = sorted({profile.settings.share_every for profile in profiles})
        return tuple(self.upload_phase(interval, round_idx) for interval in intervals)

    def dry_run_upload(
        self, client_info: ClientInfo, broadcast: Payload, round_idx: int
    ) -> tuple[Payload, tuple[PrivacyCharge, ...]]:
        """Return an upload as long as the real one, its report included, and its privacy charges.

        Raises:
            UserError: If the method's `train` returns what it did not declare.
        """
        client = self.placeholder_client(client_info, round_idx)
        if self.is_user_method:
            # The tensors are the server's own, and a hook may change what it received in place.
            broadcast = deepcopy(broadcast)
        ledger = self.privacy.make_ledger(self.backend) if self.privacy is not None else None
        with self.check_yields("train"):
            plan = self.algorithm.train(client, broadcast)
            items, reports = run_plan(plan, client, ledger or self.backend)
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
        steps = ledger.charges[client_info.client_id] if ledger is not None else []
        return upload, self.privacy.charges(steps, client.counts_accessed, bool(upload))

    def _check_shares(self, client_info: ClientInfo, upload: Payload) -> None:
        shares = client_info.settings.shares
        if unshared := describe_unshared(upload.items_, self.algorithm.uploads, shares):
            raise UserError(
                f"{type(self.algorithm).__name__}.train: {unshared}, but {client_info.client_id} "
                f"shares {', '.join(shares) or 'nothing'}; ask `may_share` before the item is made"
            )

    @contextmanager
    def check_yields(self, hook: str) -> Iterator[None]:
        """Raise UserError if the dry run inside the `with` block creates a step of a user's method and never yields it."""
        if not self.is_user_method:
            yield
            return
        self.backend.computed.clear()
        with record_steps() as created:
            yield
        for key, step in created.items():
            if key not in self.backend.computed:
                raise UserError(
                    f"{type(self.algorithm).__name__}.{hook}: a {type(step).__name__} is created but never yielded, so nothing "
                    "is computed; write `yield` before it"
                )

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

        client = PlaceholderClient(
            participant_id=client_info.client_id,
            task=federation.task,
            arch=dict(client_info.models),
            models={
                slot: dict(federation.initial_tensors(arch))
                for slot, arch in client_info.models.items()
            },
            data=data,
            settings=client_info.settings,
            label_counts=lambda: client.read_counts(),
            num_rows=client_info.num_rows,
            has_proxy=federation.data.has_proxy(client_info.preprocess),
            peers=federation.client_infos,
            round_context=federation.round_context(round_idx),
        )
        return client


@translate_user_errors()
def check_user_method(algorithm: Algorithm, federation: FederationSpec) -> None:
    """Carry out the hooks of a user's method without computing, so that slips show before anything trains.

    Raises:
        UserError: For a hook whose name is misspelt, a plan that is never run, a step that is never yielded, or an upload that was not declared.
        RunFailedError: If a hook raises an exception.
    """
    _check_hook_names(type(algorithm))
    _check_plans_are_run(type(algorithm))
    expectations = ExpectedUploads(algorithm, federation)
    server = federation.server()
    algorithm.setup(server)
    uploads = Uploads(specs=expectations.specs, common=server.common)
    profiles = federation.client_infos.profiles
    for client_id in sorted((profile.first for profile in profiles), key=natural_key):
        client_info = federation.client_infos[client_id]
        broadcast = call_broadcast(algorithm, server, client_info)
        client = expectations.placeholder_client(client_info, 0)
        plan = algorithm.deploy(client, broadcast)
        if not isinstance(plan, GeneratorType):
            raise UserError(
                f"{type(algorithm).__name__}.deploy: returns {type(plan).__name__}, but `train` runs it with `yield from`; end "
                "it with `yield from ()`"
            )
        items = expectations.expected_items(client_info, broadcast, 0)
        uploads.add(Upload(client_info, Payload(dict(items))))
    try:
        with expectations.check_yields("aggregate"):
            run_plan(algorithm.aggregate(server, uploads), server, expectations.backend)
    except UserError:
        raise
    except Exception:
        return  # the numbers of these uploads mean nothing; what fails with real ones shows in the first round


def _check_hook_names(kind: type) -> None:
    """Raise UserError for a function of a user's class whose name is nearly that of a hook."""
    hooks = [name for name in vars(Algorithm) if not name.startswith("_")]
    own = [base for base in kind.__mro__ if not base.__module__.startswith("hetero_fl.")]
    functions = [f for base in own for f in vars(base).values() if inspect.isfunction(f)]
    for function in functions:
        name = function.__name__
        meant = get_close_matches(name, hooks, 1, cutoff=NEARLY)
        if meant and name not in hooks and not name.startswith("_"):
            raise UserError(
                f"{function.__qualname__}: no hook has this name; did you mean {meant[0]}?"
            )


def _check_plans_are_run(kind: type) -> None:
    """Raise UserError for a statement of a user's class that creates a plan and drops it."""
    own = [base for base in kind.__mro__ if not base.__module__.startswith("hetero_fl.")]
    functions = [f for base in own for f in vars(base).values() if inspect.isfunction(f)]
    for function in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):  # typed into a shell, or a lambda
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and _creates_plan(node.value, kind, function):
                name = ast.unparse(node.value.func)  # type: ignore[attr-defined]  # it is a call
                line = function.__code__.co_firstlineno + node.lineno - 1
                raise UserError(
                    f"{function.__qualname__} ({function.__code__.co_filename}, line {line}): the plan {name}(…) is created but "
                    "never run; write `yield from` before it"
                )


def _creates_plan(node: ast.expr, kind: type, function: FunctionType) -> bool:
    """Return whether an expression calls a generator function of `self`, of `super()` or of a class."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = ast.unparse(node.func.value)
    target = kind if owner in ("self", "super()") else function.__globals__.get(owner)
    return inspect.isgeneratorfunction(getattr(target, node.func.attr, None))


def compact_zeros(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros of that shape; if there are many, all of them are one number in memory, and nothing can be written there."""
    if math.prod(shape) <= MOST_ZEROS:
        return torch.zeros(shape, dtype=dtype)
    return torch.zeros((), dtype=dtype).expand(shape)


def payload_structure(payload: Payload) -> tuple[Any, ...]:
    """Return the name of each item with its shape, or with its number of named tensors."""
    return tuple(
        (name, tuple(values.shape) if isinstance(values, Tensor) else len(values))
        for name, values in payload.items()
    )

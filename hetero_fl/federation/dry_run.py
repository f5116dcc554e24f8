"""Dry runs of plans, which determine the structure of uploads and check user-defined methods.

A dry run executes the hooks of a method with a backend that computes nothing. The structure of an
upload consists of the names, shapes and dtypes of the items.
"""

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
    Step,
    StepKey,
    record_steps,
)
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.engine.driver import Work, reported_loss, run_plan, translate_user_errors
from hetero_fl.engine.operations import step_flops
from hetero_fl.engine.templates import Templates, step_model_spec
from hetero_fl.federation.federation import FederationSpec
from hetero_fl.privacy.accounting import PrivacyCharge
from hetero_fl.privacy.client_side import ClientPrivacy, upload_specs
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.ordering import natural_key

# Minimum similarity of a name to that of a hook to count as a misspelling: `agregate` does,
# `deployed` does not.
MIN_HOOK_SIMILARITY = 0.88
# Number of elements up to which `compact_zeros` returns an ordinary, writable tensor.
MAX_DENSE_ZEROS = 2**24


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
            arch.outputs if step.readout != "features" else self.templates(arch).module.feature_dim
        )
        if isinstance(step, Predict):
            return compact_zeros(len(step.data.columns(participant)["x"]), int(width))
        assert isinstance(step, ClassSums)
        classes = participant.task.outputs
        return torch.zeros(classes, int(width)), torch.zeros(classes)


class PlaceholderClient(Participant):
    """Client with placeholders instead of private data.

    Attributes:
        counts_accessed: Whether a plan has read the label counts.
    """

    counts_accessed = False

    def read_counts(self) -> Tensor:
        """Return zeros in place of the label counts, and record the access."""
        self.counts_accessed = True
        return torch.zeros(self.task.outputs)


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
    """

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
        """Return the phase of a round for each value of `share_every` among the clients.

        The phases are in ascending order of `share_every`.
        """
        profiles = self.federation.client_infos.profiles
        intervals = sorted({profile.settings.share_every for profile in profiles})
        return tuple(self.upload_phase(interval, round_idx) for interval in intervals)

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
        ledger = self.privacy.make_ledger(self.backend) if self.privacy is not None else None
        with self.check_yields("train"):
            plan = self.algorithm.train(client, broadcast)
            items, reports = run_plan(client, plan, ledger or self.backend)
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
        if unshared := describe_unshared(upload.items_by_name, self.algorithm.uploads, shares):
            raise UserError(
                f"{type(self.algorithm).__name__}.train: {unshared}, but {client_info.client_id} "
                f"shares {', '.join(shares) or 'nothing'}; "
                "check `may_share` before creating the item"
            )

    @contextmanager
    def check_yields(self, hook: str) -> Iterator[None]:
        """Check that a user-defined hook yields all steps that the hook creates in the context.

        Methods of this package are not checked.

        Args:
            hook: Name of the hook, for the error message.

        Raises:
            UserError: If a step is created but not yielded. Raised at the end of the context.
        """
        if not self.is_user_method:
            yield
            return
        self.backend.computed.clear()
        with record_steps() as created:
            yield
        for key, step in created.items():
            if key not in self.backend.computed:
                raise UserError(
                    f"{type(self.algorithm).__name__}.{hook}: a {type(step).__name__} is created "
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

        def label_counts() -> Tensor:
            return client.read_counts()

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
            label_counts=label_counts,
            num_rows=client_info.num_rows,
            has_proxy=federation.data.has_proxy(client_info.preprocess),
            peers=federation.client_infos,
            round_context=federation.round_context(round_idx),
        )
        return client


@translate_user_errors()
def check_user_method(algorithm: Algorithm, federation: FederationSpec) -> None:
    """Check a user-defined method for mistakes by running the hooks without computation.

    Raises:
        UserError: If the name of a hook is misspelled, `deploy` is not a generator, a plan is never
            run, a step is never yielded or an uploaded item is not declared.
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
                f"{type(algorithm).__name__}.deploy: expected a generator, got "
                f"{type(plan).__name__}; end the function with `yield from ()`"
            )
        items = expectations.expected_items(client_info, broadcast, 0)
        uploads.add(Upload(client_info, Payload(dict(items))))
    try:
        with expectations.check_yields("aggregate"):
            run_plan(server, algorithm.aggregate(server, uploads), expectations.backend)
    except UserError:
        raise
    except Exception:
        # The uploads contain zeros, which can cause errors that do not occur in a real round.
        return


def _user_functions(algorithm_class: type) -> list[FunctionType]:
    """Return the functions of a class and of all base classes outside this package."""
    bases = [b for b in algorithm_class.__mro__ if not b.__module__.startswith("hetero_fl.")]
    return [f for base in bases for f in vars(base).values() if inspect.isfunction(f)]


def _check_hook_names(algorithm_class: type) -> None:
    """Raise UserError if the name of a function looks like a misspelled hook."""
    methods = [
        base
        for base in algorithm_class.__mro__
        if issubclass(base, Algorithm) and base.__module__.startswith("hetero_fl.")
    ]
    hooks = {name for method in methods for name in vars(method) if not name.startswith("_")}
    for function in _user_functions(algorithm_class):
        name = function.__name__
        matches = get_close_matches(name, hooks, 1, cutoff=MIN_HOOK_SIMILARITY)
        if matches and name not in hooks and not name.startswith("_"):
            raise UserError(
                f"{function.__qualname__}: unknown hook {name!r}; did you mean {matches[0]!r}?"
            )


def _check_plans_are_run(algorithm_class: type) -> None:
    """Check that each statement that creates a plan also runs the plan.

    Raises:
        UserError: If a plan is created but never run.
    """
    for function in _user_functions(algorithm_class):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError):
            # A function from an interactive shell, or a lambda.
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and _creates_plan(node.value, algorithm_class, function):
                name = ast.unparse(node.value.func)  # type: ignore[attr-defined]  # it is a call
                line = function.__code__.co_firstlineno + node.lineno - 1
                raise UserError(
                    f"{function.__qualname__} ({function.__code__.co_filename}, line {line}): "
                    f"the plan {name}(…) is created but never run; write `yield from` before it"
                )


def _creates_plan(node: ast.expr, algorithm_class: type, function: FunctionType) -> bool:
    """Return whether an expression calls a generator function of `self`, `super()` or a class."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    owner = ast.unparse(node.func.value)
    is_own = owner in ("self", "super()")
    target = algorithm_class if is_own else function.__globals__.get(owner)
    return inspect.isgeneratorfunction(getattr(target, node.func.attr, None))


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

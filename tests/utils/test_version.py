"""Uses of a name of the previous release raise one line with the new name."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hetero_fl.core.participant
import hetero_fl.core.plan
import hetero_fl.data.federated_data
import hetero_fl.experiment.preparation
from hetero_fl.aggregation import uploads
from hetero_fl.algorithms import Algorithm, FedAvg, register_algorithm
from hetero_fl.algorithms.distillation import ProxyDistillation, ProxyTraining
from hetero_fl.algorithms.mutual import MenteeTraining
from hetero_fl.core.model_spec import ModelSpec
from hetero_fl.core.objectives import Objective
from hetero_fl.core.participant import ClientInfo, RoundContext
from hetero_fl.core.plan import Rows
from hetero_fl.data.partition import PartitionContext
from hetero_fl.federation.trainer import FederatedTrainer
from hetero_fl.robustness import attacks, rules
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.registry import import_reference
from hetero_fl.utils.version import MOVED_NAMES, RENAMED_MEMBERS, describe_new_name
from tests.support.cases import each_case


@each_case(
    ("line", "hint"),
    [
        (
            "from hetero_fl.plan import Predict",
            "hetero_fl.plan is now hetero_fl.core.plan",
        ),
        (
            "from hetero_fl.channel.attacks import Attack",
            "hetero_fl.channel.attacks is now hetero_fl.robustness.attacks",
        ),
        (
            "from hetero_fl.config import load_config",
            "hetero_fl.config.load_config is now hetero_fl.load_config",
        ),
        (
            "from hetero_fl.objectives import Digest",
            "hetero_fl.objectives.Digest is now hetero_fl.core.objectives.TeacherDistillation",
        ),
        (
            "from hetero_fl.algorithms import algorithm",
            "hetero_fl.algorithms.algorithm is now hetero_fl.algorithms.register_algorithm",
        ),
        (
            "from hetero_fl.core.objectives import Digest",
            "hetero_fl.core.objectives.Digest is now hetero_fl.core.objectives.TeacherDistillation",
        ),
        (
            "from hetero_fl.algorithms import FedAvg\nclass Method(FedAvg):\n    reads = 'late'",
            "Algorithm.reads is now Algorithm.evaluated_when",
        ),
        (
            "import hetero_fl.data\n@hetero_fl.data.source('mine')\ndef mine(config, root): ...",
            "hetero_fl.data.source is now hetero_fl.data.register_source",
        ),
    ],
)
def test_import_of_moved_name_suggests_new_name(
    line: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "older_method.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(UserError) as error:
        import_reference("python:older_method:Method", "algorithm.name", object)

    assert hint in str(error.value)
    assert "\n" not in str(error.value)


OLDER = """
from typing import ClassVar

from hetero_fl.algorithms import FedAvg
from tests.support.cases import each_case


class Method(FedAvg):
    reads: ClassVar[str] = "at the end"

    def start(self, server):
        pass

    def personalise(self, client, got):  # style: ok (former name)
        yield from ()


class Newer(FedAvg):
    start: int = 3

    def setup(self, server):
        pass
"""


def test_class_with_old_hooks_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "older_hooks.py").write_text(OLDER)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(UserError) as error:
        import_reference("python:older_hooks:Method", "algorithm.name", Algorithm)

    assert str(error.value) == (
        "algorithm.name: python:older_hooks:Method: Method.reads is now evaluated_when, "
        "Method.start is now setup, Method.personalise is now personalize"  # style: ok (old name)
    )
    assert import_reference("python:older_hooks:Newer", "algorithm.name", Algorithm)


def test_registered_class_with_old_hooks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register_algorithm, "_known", dict(register_algorithm._known))
    register_algorithm("older")(type("Older", (FedAvg,), {"gives": lambda self: True}))

    words = (
        r"^algorithm 'older': Older\.gives is now hetero_fl\.algorithms\.may_share\(client, …\)$"
    )
    with pytest.raises(UserError, match=words):
        register_algorithm["older"]


CLIENT = ClientInfo.__new__(ClientInfo)


@each_case(
    ("use", "hint"),
    [
        (lambda: CLIENT.n, "; ClientInfo.n is now ClientInfo.num_rows"),  # type: ignore[attr-defined]
        (lambda: FedAvg().server_slot, "; Algorithm.server_slot is now Algorithm.server_model"),  # type: ignore[attr-defined]
        (
            lambda: FedAvg().fit(None),  # type: ignore[attr-defined]
            "; Algorithm.fit is now hetero_fl.algorithms.local_fit(client, …)",
        ),
        (lambda: super(FedAvg, FedAvg()).start, "; Algorithm.start is now Algorithm.setup"),  # type: ignore[misc]
        (lambda: FedAvg.personalise, "; Algorithm.personalise is now Algorithm.personalize"),  # type: ignore[attr-defined]  # style: ok (former name)
        (
            lambda: uploads.Uploads.having,  # type: ignore[attr-defined]
            "; Uploads.having is now Uploads.containing",
        ),
        (lambda: Rows("proxy", beside={}), "; Rows.beside is now Rows.extra_columns"),  # type: ignore[call-arg]  # style: ok (former name)
        (
            lambda: replace(Rows("proxy"), through=None),  # type: ignore[call-arg]
            "; Rows.through is now Rows.preprocess",
        ),
        (
            lambda: _raise(ImportError("cannot import name 'Link'", name="hetero_fl.channel.link")),
            "; hetero_fl.channel.link is now hetero_fl.communication.link",
        ),
        (lambda: CLIENT.nothing, ""),  # type: ignore[attr-defined]
        (lambda: Rows("proxy", nothing=1), ""),  # type: ignore[call-arg]
        (lambda: 1 / 0, ""),
    ],
)
def test_old_member_suggests_new_name(use: Callable[[], Any], hint: str) -> None:
    with pytest.raises(Exception) as error:
        use()

    assert describe_new_name(error.value) == hint


MODULES = [
    attacks, hetero_fl.core.participant, hetero_fl.core.plan, hetero_fl.data.federated_data,
    hetero_fl.experiment.preparation, rules, uploads,
]  # fmt: skip
CLASSES = {
    kind.__name__: kind
    for kind in [
        Algorithm, FederatedTrainer, MenteeTraining, ModelSpec, Objective, PartitionContext,
        ProxyDistillation, ProxyTraining, RoundContext,
        *[kind for module in MODULES for kind in vars(module).values() if isinstance(kind, type)],
    ]
}  # fmt: skip


@each_case("name", RENAMED_MEMBERS)
def test_renamed_members_are_removed(name: str) -> None:
    kind = CLASSES[name]
    members = {*dir(kind), *getattr(kind, "__annotations__", {})}
    members |= {*getattr(getattr(kind.__init__, "__code__", None), "co_names", ())}

    for old, new in RENAMED_MEMBERS[name].items():
        assert old not in members
        if new.isidentifier():
            assert new in members
        elif new.startswith("hetero_fl."):
            _resolve(new.partition("(")[0])


def _raise(error: Exception) -> None:
    raise error


def test_moved_names_are_removed() -> None:
    for old, new in MOVED_NAMES.items():
        with contextlib.suppress(ImportError, AttributeError):
            found = _resolve(old)
            # an older checkout may have left a folder without files
            assert isinstance(found, ModuleType) and found.__file__ is None, old
        _resolve(new)


def _resolve(name: str) -> object:
    """Return the module or attribute with a dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

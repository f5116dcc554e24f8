"""A site's limits: requests beyond them are refused with an error that names the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hetero_fl.communication.named_arrays import decode_arrays, encode_arrays
from hetero_fl.communication.secure_aggregation.client import REPLIES, REQUESTS
from hetero_fl.core.payload import Item, Payload
from hetero_fl.deployment import audit_log
from hetero_fl.deployment.audit_log import AuditLog, SiteUsage, verify
from hetero_fl.deployment.config import SiteConfig, load_site_config
from hetero_fl.deployment.messages import RequestRefusedError, decode_body, message
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.policy import run_fingerprint
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.privacy.accounting import epsilon_of_mechanisms, gaussian_epsilon
from hetero_fl.utils.errors import RunFailedError, UserError
from hetero_fl.utils.serialization import encode
from tests.support.cases import each_case
from tests.support.deployments import SITES, Federation, small
from tests.support.image_folders import make_image_folder
from tests.support.mistaken_files import check_terms
from tests.support.node_session import NodeSession
from tests.support.nodes import NodeEndedError

SECURE = {"channel__secure_sum": {"threshold": 2}}
RECORD = {"privacy": {"noise_multiplier": 1.0, "unit": "record"}}
LOCAL = {"privacy": {"noise_multiplier": 1.0, "unit": "local", "clip": 1.0}}
BUDGET = {"privacy": {"epsilon": 8.0}}


TERMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "method": (
        {"allows": {"methods": ["hybrid", "fedmd"]}},
        {},
        "algorithm.name: fedavg is not in this site's allows.methods (hybrid, fedmd)",
    ),
    "rounds": (
        {"allows": {"rounds": 1}},
        {},
        "rounds: must be <= 1 (this site's allows.rounds), got 2",
    ),
    "epochs": (
        {"allows": {"epochs": 2}},
        {"clients__defaults__epochs": 3},
        "clients: 'site_1': epochs: must be <= 2 (this site's allows.epochs), got 3",
    ),
    "steps": (
        {"allows": {"steps": 10}},
        {"clients__defaults__steps": 11},
        "clients: 'site_1': steps: must be <= 10 (this site's allows.steps), got 11",
    ),
    "no secure sum": (
        {"allows": {"secure_sum_only": True}},
        {},
        "channel.secure_sum: required by this site's allows.secure_sum_only",
    ),
    "a small secure sum": (
        {"allows": {"cohort": 3}},
        SECURE,
        "channel.secure_sum.threshold: must be >= 3 clients (this site's allows.cohort), got 2",
    ),
    "a site without a known key": (
        {"allows": {"keys": {"site_2": "site_2.pub"}}},
        SECURE,
        "clients: 'site_3' has no key in this site's allows.keys",
    ),
    "more shares": (
        {"shares": ["predictions"]},
        {"clients__defaults__shares": ["predictions", "parameters"]},
        "clients: 'site_1': shares: parameters not allowed; this site's shares are predictions",
    ),
    "the whole of a part": (
        {"shares": ["backbone"]},
        {"clients__defaults__shares": ["head."]},
        "clients: 'site_1': shares: head. not allowed; this site's shares are backbone",
    ),
    "another model": (
        {"model": "mlp"},
        {},
        "clients: 'site_1': model: must be equal to model in this site's file",
    ),
    "no noise": (
        {"allows": BUDGET},
        {},
        "privacy: required by this site's allows.privacy",
    ),
    "the server's noise": (
        {"allows": BUDGET},
        {"privacy": {"noise_multiplier": 1.0, "unit": "client"}},
        "privacy.unit: expected record or local, got client; with this site's allows.privacy "
        "the site must add the noise",
    ),
    "labels told with noise": (
        {"allows": BUDGET, "tells": {"labels": True}},
        RECORD,
        "tells.labels=true cannot be combined with allows.privacy, because it reveals exact "
        "counts; set tells.labels=false in this site's file",
    ),
    "a model told with noise": (
        {"allows": BUDGET, "tells": {"model": True}},
        LOCAL,
        "tells.model=true cannot be combined with allows.privacy and privacy.unit=local, "
        "because it reveals a model without noise; set tells.model=false in this site's file",
    ),
}


@each_case(("site", "changes", "expected"), TERMS.values())
def test_disallowed_configuration_is_refused(
    site: dict[str, Any], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        check_terms(site, **changes)

    assert str(caught.value) == expected


@each_case(
    ("site", "changes"),
    [
        ({"shares": ["parameters"]}, {"clients__defaults__shares": ["backbone"]}),
        ({"shares": ["parameters", "predictions"]}, {"clients__defaults__shares": ["backbone.1."]}),
        ({"shares": ["backbone"]}, {"clients__defaults__shares": ["backbone.1."]}),
        ({"model": "cnn_gn_small"}, {}),
        ({"allows": {"cohort": 2, "secure_sum_only": True}}, SECURE),
        ({"allows": {**BUDGET, "rounds": 2, "epochs": 1, "methods": ["fedavg"]}}, RECORD),
    ],
)
def test_settings_within_limits_are_accepted(site: dict[str, Any], changes: dict[str, Any]) -> None:
    check_terms(site, **changes)


def test_refused_terms_are_shown_and_logged(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"site_2": {"allows": {"rounds": 1}}})
    line = "rounds: must be <= 1 (this site's allows.rounds), got 2"
    with pytest.raises(
        RunFailedError, match=f"^site_2: the node refused the run: {re.escape(line)}$"
    ):
        federation.serve(small())
    assert f"refused: {line}" in federation.log_lines
    outcomes = [entry["outcome"] for entry in verify(tmp_path / "site_2" / "audit.jsonl")]
    assert outcomes == ["here", f"refused: {line}", "left"]
    assert not (tmp_path / "run").exists()


# Tasks

# The server's configuration is allowed; what it asks then is not.
TASKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "bytes of an upload": (
        {"upload_bytes": 1000},
        {},
        "bytes of this upload: must be <= 1,000 (this site's allows.upload_bytes), got {}",
    ),
    "epochs of a plan": (
        {"epochs": 1},
        {"algorithm": {"name": "fedrep"}},
        "epochs of this task: must be <= 1 (this site's allows.epochs), got {}",
    ),
    "epochs of a plan in a secure sum": (
        {"epochs": 1},
        {"algorithm": {"name": "fedrep"}, **SECURE},
        "epochs of this task: must be <= 1 (this site's allows.epochs), got {}",
    ),
    "steps of a plan": (
        {"steps": 1},
        {},
        "steps of this task: must be <= 1 (this site's allows.steps), got {}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TASKS)
def test_disallowed_task_is_refused_and_run_continues(case: str, tmp_path: Path) -> None:
    allows, changes, expected = TASKS[case]
    run = Federation(tmp_path, {"site_1": {"allows": allows}}).serve(small(rounds=1, **changes))
    (record,) = run.metrics
    before, after = expected.split("{}")
    assert record["failed"].keys() == {"site_1"}
    assert record["failed"]["site_1"].startswith(before) and record["failed"]["site_1"].endswith(
        after
    )
    entries = [
        line for line in verify(tmp_path / "site_1" / "audit.jsonl") if line.get("what") == "train"
    ]
    assert [line["out"] for line in entries] == [0]


def test_evaluation_with_too_much_training_is_refused(tmp_path: Path) -> None:
    site = {"allows": {"epochs": 2}}
    longer = {"algorithm": {"name": "fedbabu", "fine_tune_epochs": 3}}
    (record,) = Federation(tmp_path, {"site_1": site}).serve(small(rounds=1, **longer)).metrics
    assert not record["failed"]
    assert record["absent"] == {
        "site_1": "epochs of this task: must be <= 2 (this site's allows.epochs), got 3"
    }


def test_bytes_of_repeated_answers_are_counted(tmp_path: Path) -> None:
    session = NodeSession(tmp_path, {}, rounds=1)
    size = len(session.repeat("train").body)
    sent = sum(line["out"] for line in verify(tmp_path / "site_1" / "audit.jsonl"))
    allows = session.node.site.allows.model_copy(update={"total_bytes": sent + size})
    session.node.joined.policy.allows = allows
    assert len(session.repeat("train").body) == size
    assert "bytes of all answers including this one" in session.refusal_reason("train")


def test_total_bytes_include_earlier_runs(tmp_path: Path) -> None:
    Federation(tmp_path).serve(small(rounds=1))
    sent = sum(line["out"] for line in verify(tmp_path / "site_1" / "audit.jsonl"))
    again = Federation(tmp_path, {"site_1": {"allows": {"total_bytes": sent + 20_000}}})
    run = again.serve(small(rounds=1), out=tmp_path / "again")
    assert "bytes of all answers including this one" in run.metrics[0]["failed"]["site_1"]


def test_privacy_budget_spans_runs_and_restarts(tmp_path: Path) -> None:
    """The budget covers four Gaussian releases with z = 2, not the fifth.

    The privacy unit is local: each upload may change entirely.
    """
    four, five = (gaussian_epsilon(count**0.5 / 2.0, 1e-5) for count in (4, 5))
    site = {"site_1": {"allows": {"privacy": {"epsilon": (four + five) / 2}}}}
    changes = {"privacy": {"noise_multiplier": 2.0, "unit": "local", "clip": 1.0}, "rounds": 3}
    first = Federation(tmp_path, site).serve(small(**changes))
    assert all(not record["failed"] for record in first.metrics)
    second = Federation(tmp_path, site).serve(small(**changes), out=tmp_path / "again")
    assert [list(record["failed"]) for record in second.metrics] == [[], ["site_1"], ["site_1"]]
    budget = f"must be <= {(four + five) / 2:g} (this site's allows.privacy.epsilon)"
    expected = f"ε at δ=1e-05 after this task: {budget}, got {five:.4g}"
    assert second.metrics[1]["failed"]["site_1"].startswith(expected)
    spent = [line for line in verify(tmp_path / "site_1" / "audit.jsonl") if line.get("spent")]
    assert len(spent) == 4


@pytest.mark.slow
@each_case(
    ("method", "changes"),
    [
        ("fedavg", {"privacy": {**RECORD["privacy"], "sample_rate": 0.1}}),
        # It reads the label counts, which are charged once.
        ("fedlc", RECORD),
        ("fedproto", RECORD),
        ("fedmd", LOCAL),
    ],
)
def test_site_accounting_matches_the_server(
    method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    site = {"allows": {"privacy": {"epsilon": 1e6}}}
    privacy = {**changes["privacy"], "accountant": "rdp"}
    run = Federation(tmp_path, dict.fromkeys(SITES, site)).serve(small(method, privacy=privacy))
    found = []
    for site_id in SITES:
        account = SiteUsage.from_log(verify(tmp_path / site_id / "audit.jsonl"), "")
        found.append(epsilon_of_mechanisms(account.with_charges(()), 1e-5, "rdp"))
    assert max(found) == pytest.approx(run.metrics[-1]["privacy"]["epsilon"])


@each_case(
    "error", [OSError(30, "Read-only file system"), NodeEndedError("killed before the line")]
)
def test_answer_that_was_not_logged_is_charged_once_when_it_leaves(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site trains, fails before the line is on disk, and is restarted with its clock set back."""
    site = {"allows": {"privacy": {"epsilon": 1e6}}}
    federation = Federation(tmp_path, dict.fromkeys(SITES, site))
    nodes = [federation.nodes["site_1"]]
    write = AuditLog._write

    def fail(log: AuditLog, line: bytes) -> None:
        if b'"spent"' in line:
            raise error
        write(log, line)

    def restart(_: Handle) -> Handle:
        def handle(envelope: Envelope) -> Envelope:
            if envelope.head.get("what") != "train" or len(nodes) > 1:
                return nodes[-1].handle(envelope)
            with monkeypatch.context() as patch, pytest.raises((RunFailedError, NodeEndedError)):
                patch.setattr(AuditLog, "_write", fail)
                nodes[-1].handle(envelope)
            nodes.append(Node(nodes[0].site, nodes[0].folder))
            monkeypatch.setattr(audit_log.time, "time", lambda: 1e9)
            return nodes[-1].handle(envelope)

        return handle

    run = federation.serve(small(**LOCAL), {"site_1": restart})

    assert not any(record["failed"] for record in run.metrics)
    entries = verify(tmp_path / "site_1" / "audit.jsonl")
    first = next(entry for entry in entries if entry.get("spent"))
    assert first["kinds"] == ["what was answered before"]
    account = SiteUsage.from_log(entries, "").with_charges(())
    assert epsilon_of_mechanisms(account, 1e-5) == run.metrics[-1]["privacy"]["epsilon"]


# A server that deviates from the agreed task


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> NodeSession:
    site = {"allows": {"rounds": 2, "epochs": 1}}
    return NodeSession(tmp_path_factory.mktemp("asked"), site, output__loggers=["csv"])


def test_repeated_task_is_answered_only_if_unchanged(
    session: NodeSession,
) -> None:
    assert session.repeat("train").head["ask"] == "done"
    for change in (
        {"body": session.requests["train"].body + b" "},
        {"round": 0},
        {"base": "a" * 64},
    ):
        assert session.refusal_reason("train", **change).endswith(
            "was sent before with different content"
        )


def test_expired_task_is_refused(session: NodeSession) -> None:
    assert session.refusal_reason("train", expires=1.0).endswith(
        "has expired; check the clocks of the site and the server"
    )


@each_case(
    ("head", "expected"),
    [
        ({"round": 3}, "round 4 of 2"),
        ({"round": 2}, "round 3 of 2"),
        ({"round": -1}, "round 0 of 2"),
        (
            {"round": 1, "again": 1},
            "training tasks of this run: must be <= 2 (this site's allows.rounds), got 3",
        ),
        ({"round": "1"}, "'do': round: expected an integer, got '1'"),
        ({"kind": "other"}, "kind: expected 'answer' or 'read', got 'other'"),
        # Under another name, training would be neither limited nor charged.
        ({"what": "keys"}, "request: unknown kind 'keys'; choose from train"),
        ({"what": "read"}, "request: unknown kind 'read'; choose from train"),
        ({"what": ""}, "request: unknown kind ''; choose from train"),
        ({"what": "Train"}, "request: unknown kind 'Train'; choose from train"),
        (
            {"task": "../../etc/passwd"},
            "'do': task: must match ^[A-Za-z0-9]{1,64}$, got '../../etc/passwd'",
        ),
    ],
)
def test_task_that_was_not_agreed_is_refused(
    session: NodeSession, head: dict[str, Any], expected: str
) -> None:
    assert expected in session.refusal_reason(
        "train", **{"task": f"b{abs(hash(expected))}", **head}
    )


@each_case(
    "body", [b"", b"x", b"\xff" * 100, encode({"items": {}, "report": {}}, "hetero_fl payload 1")]
)
def test_malformed_broadcast_is_refused(session: NodeSession, body: bytes) -> None:
    answer = session.repeat("train", body, task="c" * 64, again=2)
    assert answer.head["ask"] == "refused"


def test_repeated_training_costs_nothing(tmp_path: Path) -> None:
    """The answer has the same noise, although the site computes it again."""
    session = NodeSession(tmp_path, {"allows": BUDGET}, rounds=1, **LOCAL)

    first = session.repeat("train", task="a" * 64)
    second = session.repeat("train", task="b" * 64)

    assert first.body == second.body
    lines = [line for line in session.node.audit_log.entries() if line.get("what") == "train"]
    assert [bool(line.get("spent")) for line in lines] == [True, False, False]


def start_secure_sum(session: NodeSession, again: int) -> None:
    """Ask for new keys, and send them back, so that the node is ready to train."""
    reply = session.repeat("keys", task=f"keys{again}", again=again)
    request = decode_arrays(session.requests["shares"].body, REQUESTS["shares"])
    position = request["numbers"].tolist().index(request["head"][0])
    request["keys"][position] = decode_arrays(reply.body, REPLIES["keys"])["keys"]
    shares = encode_arrays(request)
    assert session.repeat("shares", shares, task=f"shares{again}").head["what"] == "shares"


@pytest.fixture(scope="module")
def secure_session(tmp_path_factory: pytest.TempPathFactory) -> NodeSession:
    folder = tmp_path_factory.mktemp("secure")
    site = {"allows": {"privacy": {"epsilon": 1e6}}}
    return NodeSession(folder, site, rounds=1, models="linear", **SECURE, **RECORD)


def test_training_that_was_refused_before_is_charged(secure_session: NodeSession) -> None:
    """A request out of order is refused without training, and is not charged then."""
    for _ in range(2):
        early = secure_session.repeat("train", task="early", again=1)
        assert early.head["what"] == "refused"

    start_secure_sum(secure_session, again=1)
    answer = secure_session.repeat("train", task="late", again=1)

    assert answer.head["what"] == "train"
    assert secure_session.node.audit_log.entries()[-1]["spent"]


def test_stored_answer_is_not_sent_for_another_task_of_same_name(
    secure_session: NodeSession,
) -> None:
    secure_session.repeat("keys", task="same", again=2)
    # As if many other tasks had followed.
    secure_session.node.joined.usage.tasks.clear()

    answer = secure_session.repeat("train", task="same", again=2)

    assert answer.head["what"] == "refused"
    start_secure_sum(secure_session, again=3)
    secure_session.repeat("train", task="other", again=2)
    assert secure_session.node.audit_log.entries()[-1]["spent"]


def test_loggers_run_at_the_server_only(session: NodeSession) -> None:
    config = decode_body(session.requests["terms"])["config"]

    assert config["output"]["loggers"] == []
    assert (session.run.path / "metrics.csv").exists()


def test_other_configuration_of_same_name_is_refused(session: NodeSession) -> None:
    """Answers that share noise reveal their difference; two scales of it reveal the noise."""
    terms = session.requests["terms"]
    tree = decode_body(terms)
    tree["config"]["clients"]["defaults"]["batch_size"] = 8
    text = session.refusal_reason("terms", body=message("terms", tree).body)
    assert text.endswith(
        ": the configuration, the public sets or this site's rows changed since the site joined "
        "the run; start a new run"
    )
    tree = decode_body(terms)
    tree["config"]["runtime"]["workers"] = 7
    tree["config"]["output"]["loggers"] = [{"kind": "csv"}]
    assert session.repeat("terms", body=message("terms", tree).body).head["ask"] == "told"
    assert session.repeat("join").head["ask"] == "ready"


@each_case(
    "config", [None, [], {}, {"rounds": {}}, "x", {"algorithm": {"name": "fedavg"}, "clients": 3}]
)
def test_malformed_configuration_is_refused(session: NodeSession, config: Any) -> None:
    assert (
        session.repeat("terms", body=message("terms", {"config": config, "public": ""}).body).head[
            "ask"
        ]
        == "refused"
    )
    assert (
        session.repeat("terms", body=message("terms", {"nothing": 1}).body).head["ask"] == "refused"
    )


def test_other_public_sets_of_same_name_are_refused() -> None:
    """Another proxy set gives other gradients under the same noise."""
    marks = {run_fingerprint(small(), rows, public) for rows in "ab" for public in "cd"}
    assert len(marks) == 4


@each_case(
    ("rows", "expected"),
    [
        ("train", "fingerprint: the method, seed, clients or models at this site differ"),
        # No part of the fingerprint, which the server could make fit anyway.
        ("test", "data reports: the reports of the clients changed since this site joined the run"),
    ],
)
def test_other_client_list_of_same_name_is_refused(
    session: NodeSession, rows: str, expected: str
) -> None:
    """The noise scale depends on all clients' rows; two scales of the same noise reveal it."""
    tree = decode_body(session.requests["join"])
    tree["reports"]["site_2"]["rows"][rows] += 1

    text = session.refusal_reason("join", body=message("join", tree).body)

    assert text.startswith(expected)
    assert session.repeat("join").head["ask"] == "ready"


def test_unshared_items_are_never_sent(session: NodeSession) -> None:
    joined = session.node.joined
    policy = joined.policy
    tensors = {"backbone.a": torch.zeros(1), "head.b": torch.zeros(1)}
    upload = Payload({"model": Item(tensors, 1.0, "params")})
    policy.check_upload(upload)
    for shares, expected in (
        (
            ["predictions"],
            "shares: 'model' contains backbone.a; this site's shares are predictions",
        ),
        (["backbone"], "shares: 'model' contains head.b; this site's shares are backbone"),
        ([], "shares: 'model' contains backbone.a; this site's shares are []"),
    ):
        policy.site = session.node.site.model_copy(update={"shares": shares})
        with pytest.raises(UserError) as caught:
            policy.check_upload(upload)
        assert str(caught.value) == expected
    policy.site = session.node.site
    with pytest.raises(UserError, match=r"fedavg\.train: item 'rows' is not declared in `uploads`"):
        policy.check_upload(Payload({"rows": torch.zeros(1)}))


def test_plan_with_unshared_items_is_refused_before_encoding(tmp_path: Path) -> None:
    """A method that sends more than the site shares is stopped before encoding."""
    session = NodeSession(tmp_path, rounds=2)
    policy = session.node.joined.policy
    # As if no round had taken place.
    session.node.joined.usage.trained.clear()
    policy.site = policy.site.model_copy(update={"shares": ["backbone"]})

    reason = session.refusal_reason("train", task="d" * 64, again=1)

    assert "shares: 'model' contains head." in reason


# The file


def test_site_file_of_the_deployment_guide_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "deploy.md").read_text(encoding="utf-8")
    block = page.split("```yaml\n# site.yaml\n")[1].split("```")[0]
    file = tmp_path / "site.yaml"
    # Limits that exclude the example's run are comments.
    file.write_text(re.sub(r"^  # ", "  ", block, flags=re.MULTILINE), encoding="utf-8")
    site, folder = load_site_config(file)
    assert (
        site.allows.privacy is not None
        and site.allows.privacy.epsilon == 8
        and folder == (tmp_path / "state").resolve()
    )
    assert all(getattr(site.allows, key) is not None for key in type(site.allows).model_fields)


def test_server_cannot_permit_links_of_a_site(tmp_path: Path) -> None:
    path = make_image_folder(tmp_path / "data", 60)
    source = {"name": "image_folder", "path": str(path)}
    raw = small(data={**source, "follow_links": True})
    allows = {"data": [source]}
    site = SiteConfig.model_validate({"client": "site_1", "allows": allows})

    with pytest.raises(RequestRefusedError, match=r"is not in this site's allows\.data"):
        Node(site, tmp_path)._begin("a", {"config": raw, "public": ""})

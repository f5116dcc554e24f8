"""The audit log: changes are detected with the line number, and its bytes are the server's."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key

from hetero_fl.cli import main
from hetero_fl.deployment import audit_log
from hetero_fl.deployment.audit_log import (
    INITIAL_HASH,
    AuditLog,
    format_entries,
    traffic_totals,
    verified_head,
    verify,
)
from hetero_fl.deployment.config import SiteConfig
from hetero_fl.deployment.node import Node
from hetero_fl.deployment.node_files import make_node_key
from hetero_fl.deployment.transport import Envelope
from hetero_fl.reporting.run import Run
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.deployments import SITES, Federation, small, twice
from tests.support.federations import MIXED, TOP
from tests.support.nodes import NodeEndedError

Lines = list[bytes]


KEY = generate_private_key(SECP384R1())


ABOUT = {"ask": "do", "outcome": "done", "out": 1, "in": 1}


def written(path: Path, count: int = 6) -> Path:
    log = AuditLog(path)
    for i in range(count):
        log.append(
            run="r",
            round=i,
            ask="do",
            what="train",
            out=10 + i,
            kinds=["model: params"],
            outcome="done",
            **{"in": i},
        )
    return path


def changed(line: bytes) -> bytes:
    return json.dumps({**json.loads(line), "out": 0}, ensure_ascii=False).encode() + b"\n"


FAULTS: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "the first is changed": (lambda ls: [changed(ls[0]), *ls[1:]], "line 1: changed"),
    "one in the middle is changed": (
        lambda ls: [*ls[:2], changed(ls[2]), *ls[3:]],
        "line 3: changed",
    ),
    "the last is changed": (
        lambda ls: [*ls[:-1], changed(ls[-1])],
        "line 6: differs from a known head",
    ),
    "one is no JSON": (lambda ls: [*ls[:3], b"\n", *ls[4:]], "line 4: Invalid JSON"),
    "one is nested too deeply": (
        lambda ls: [*ls[:3], b'{"a":' * 50_000 + b"\n", *ls[4:]],
        "line 4: Invalid JSON",
    ),
    "the first is removed": (lambda ls: ls[1:], "line 1: expected number 1, got 2"),
    "one is removed": (lambda ls: [*ls[:3], *ls[4:]], "line 4: expected number 4, got 5"),
    "two are swapped": (
        lambda ls: [ls[0], ls[2], ls[1], *ls[3:]],
        "line 2: expected number 2, got 3",
    ),
    "the last is cut off": (lambda ls: ls[:-1], "line 6: expected at least 6 lines, got 5"),
    "all are gone": (lambda ls: [], "line 1: expected at least 6 lines, got 0"),
    "the end is half a line": (
        lambda ls: [*ls[:-1], ls[-1][:20]],
        "line 6: expected at least 6 lines",
    ),
    "one is put to it twice": (lambda ls: [*ls, ls[-1]], "line 7: expected number 7, got 6"),
}


@each_case("fault", FAULTS)
def test_changed_lines_are_detected_and_left(fault: str, tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    assert len(verify(path)) == 6
    log = AuditLog(path)
    change, message = FAULTS[fault]
    path.write_bytes(data := b"".join(change(path.read_bytes().splitlines(keepends=True))))

    for reads in (verify, AuditLog, lambda _: log.append(**ABOUT), lambda _: log.append(**ABOUT)):
        with pytest.raises(UserError) as caught:
            reads(path)
        assert message in str(caught.value) and str(path) in str(caught.value)

    assert path.read_bytes() == data


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl", 3)
    data, draws = path.read_bytes(), random.Random(0)
    for _ in range(200):
        at, bit = draws.randrange(len(data)), 1 << draws.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        with pytest.raises(UserError, match="line"):
            verify(path)


@each_case(
    ("head", "message"),
    [
        ("5:" + "a" * 64, "line 5: differs"),
        ("junk", "audit.jsonl.head: damaged; restore"),
        ("", "audit.jsonl.head: missing or empty; restore"),
        (None, "audit.jsonl.head: missing or empty; restore"),
    ],
)
def test_head_that_does_not_fit_is_refused(head: str | None, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "audit.jsonl")
    (tmp_path / "audit.jsonl.head").unlink()
    if head is not None:
        (tmp_path / "audit.jsonl.head").write_text(head)
    for reads in (verify, AuditLog):
        with pytest.raises(UserError, match=message):
            reads(path)


@each_case("key", [None, KEY])
def test_log_of_killed_process_is_continued(key: Any, tmp_path: Path) -> None:
    """The process may have written a line without the head, or half a line."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, key)
    log.append(**ABOUT)
    head = path.with_name("audit.jsonl.head").read_bytes()
    AuditLog(path, key).append(**ABOUT)
    path.with_name("audit.jsonl.head").write_bytes(head)
    assert len(verify(path)) == 2
    with path.open("ab") as file:
        file.write(b'{"n": 3, "ti')
    assert len(verify(path)) == 2

    log.append(**ABOUT)

    assert [e["n"] for e in verify(path, key and key.public_key())] == [1, 2, 3]
    assert AuditLog(path, key).head == log.head == verified_head(path)


def test_log_of_process_killed_at_its_first_line_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    with monkeypatch.context() as patch, pytest.raises(NodeEndedError):
        patch.setattr(audit_log, "write_atomically", Mock(side_effect=NodeEndedError))
        log.append(**ABOUT)

    AuditLog(path).append(**ABOUT)

    assert len(verify(path)) == 2


def test_next_append_removes_partial_line_of_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = signed(path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 60, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.append(**ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert len(verify(path, KEY.public_key())) == 3
    log.append(**ABOUT)
    assert path.read_bytes().startswith(before + b'{"n": 4')
    AuditLog(path, KEY).append(**ABOUT)
    assert len(verify(path, KEY.public_key())) == 5


def test_audit_log_is_private_and_readable(tmp_path: Path) -> None:
    path = written(tmp_path / "state" / "audit.jsonl", 2)
    AuditLog(path).append(**{**ABOUT, "what": "read", "round": 1})

    for private in (path, path.parent, path.with_name("audit.jsonl.head")):
        assert os.stat(private).st_mode & 0o077 == 0
    _, trained, evaluated = format_entries(verify(path))
    assert "round 2" in trained and "  train  " in trained
    assert "1 in, 11 out (model: params)" in trained
    assert "  evaluate  " in evaluated


def test_totals_count_each_task_once(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    common = {"run": "r", "round": 0, "in": 5}
    log.append(ask="terms", out=99, outcome="told", **common)
    train = {"ask": "do", "what": "train", **common}
    log.append(out=7, outcome="done", asked="aa", **train)
    log.append(out=7, outcome="again", asked="aa", **train)
    log.append(out=0, outcome="refused: no", asked="bb", **train)
    log.append(out=9, outcome="done", asked="bb", **train)
    log.append(out=3, outcome="done", asked="cc", **{**train, "what": "read"})
    log.append(out=1, outcome="done", asked="dd", **{**train, "run": "another"})
    found = traffic_totals(log.entries(), "r")
    assert (found.up, found.down) == (16, 15)


def test_log_that_cannot_be_read_raises_one_line(tmp_path: Path) -> None:
    for name in ("audit.jsonl", "x" * 5000):
        with pytest.raises(UserError, match="not found"):
            verify(tmp_path / name)
    for name in ("audit.jsonl", "audit.jsonl.head"):
        path = written(tmp_path / name / "audit.jsonl", 1)
        path.with_name(name).unlink()
        path.with_name(name).mkdir()
        for reads in (verify, AuditLog):
            with pytest.raises(UserError, match=rf"{name}: cannot be read \(Is a directory\)$"):
                reads(path)


def foreign(path: Path, entry: dict[str, object]) -> Path:
    """Write a second line of any form with a correct number, hash and head."""
    lines = written(path, 1).read_bytes().splitlines(keepends=True)
    first = {
        "n": 2,
        "time": "now",
        "in": 1,
        "out": 1,
        "outcome": "done",
        "before": hashlib.sha256(lines[0]).hexdigest(),
    }
    run_config = {name: value for name, value in {**first, **entry}.items() if value is not None}
    replaced(path, [*lines, json.dumps(run_config).encode() + b"\n"])
    return path


@each_case(
    "entry",
    [
        {"in": None},
        {"time": None},
        {"outcome": None},
        {"out": True},
        {"n": 2.0},
        {"in": "x"},
        {"kinds": 5},
        {"kinds": [5]},
        {"asked": [1]},
        {"asked": "xy"},
        {"run": {}},
        {"round": "1"},
        {"round": 10**4200},
        {"spent": [1]},
        {"spent": [{"noise": "x", "rate": 1, "steps": 1, "once": ""}]},
        {"spent": [{"noise": 1.0, "rate": 1, "steps": -1, "once": ""}]},
        {"spent": [{"noise": 1.0, "rate": 1, "steps": 1}]},
        {"what": ["\ud800"]},
    ],
)
def test_node_audit_names_a_line_of_another_form(
    entry: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(tmp_path / "audit.jsonl", entry)

    assert main(["audit-log", str(path)]) == 2

    error = capsys.readouterr().err
    assert f"line 2: {next(iter(entry))}: " in error or "line 2: Invalid JSON" in error
    assert error.count("\n") == 1


def test_node_audit_escapes_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = dict.fromkeys(("time", "outcome", "run", "ask", "what"), "\x1b[2J\n")
    path = foreign(tmp_path / "audit.jsonl", {**texts, "kinds": ["\x1b"], "round": 1})

    assert main(["audit-log", str(path)]) == 0

    printed = capsys.readouterr().out
    assert "\x1b" not in printed and printed.count("\\x1b") >= 4


# Signatures


def signed(path: Path, key: Any = KEY) -> AuditLog:
    log = AuditLog(path, key)
    for _ in range(3):
        log.append(**ABOUT)
    return log


def forged(path: Path, **changes: object) -> bytes:
    """Return one more line with a correct number and hash, but made without the key."""
    last = path.read_bytes().splitlines(keepends=True)[-1]
    entry = {
        **json.loads(last),
        "n": json.loads(last)["n"] + 1,
        "before": hashlib.sha256(last).hexdigest(),
        **changes,
    }
    return json.dumps(entry).encode() + b"\n"


def replaced(path: Path, lines: Lines) -> None:
    """Write a log and a head that agree, as anyone can without the private key."""
    path.write_bytes(b"".join(lines))
    head = f"{len(lines)}:{hashlib.sha256(lines[-1]).hexdigest()}"
    path.with_name(path.name + ".head").write_text(head)


def append_line(path: Path) -> None:
    line = forged(path, out=10**9)
    replaced(path, [*path.read_bytes().splitlines(keepends=True), line])


def rewrite(path: Path, key: Any) -> None:
    other = signed(path.with_name("other.jsonl"), key=key).path
    replaced(path, other.read_bytes().splitlines(keepends=True))


@each_case(
    ("forge", "message"),
    [
        (append_line, "line 4: not signed with this site's key"),
        (lambda path: rewrite(path, None), "line 3: not signed with this site's key"),
        (
            lambda path: rewrite(path, generate_private_key(SECP384R1())),
            "line 3: not signed with this site's key",
        ),
    ],
)
def test_history_made_without_the_key_is_refused(
    forge: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    log = signed(tmp_path / "audit.jsonl")
    path = log.path
    assert len(verify(path, KEY.public_key())) == 3

    forge(path)

    for reads in (lambda: verify(path, KEY.public_key()), lambda: AuditLog(path, KEY)):
        with pytest.raises(UserError, match=message):
            reads()
    with pytest.raises(UserError, match=f"{message}|line 3: differs from a known head"):
        log.append(**ABOUT)


def test_recorded_head_detects_truncation(tmp_path: Path) -> None:
    """Truncating both files shows only against a head that was noted before."""
    log = signed(tmp_path / "audit.jsonl")
    noted, files = (
        log.head,
        [(path, path.read_bytes()) for path in (log.path, log.path.with_name("audit.jsonl.head"))],
    )
    log.append(**ABOUT)
    later = log.head
    assert len(verify(log.path, KEY.public_key(), noted)) == 4 and later == verified_head(log.path)

    for path, data in files:
        path.write_bytes(data)

    assert len(verify(log.path, KEY.public_key(), noted)) == 3
    with pytest.raises(UserError, match="expected at least 4 lines, got 3"):
        verify(log.path, KEY.public_key(), later)


@each_case("content", ["junk\n", ""])
def test_node_stops_once_its_log_is_edited_or_cut(content: str, tmp_path: Path) -> None:
    node = Node(SiteConfig(client="site_2"), tmp_path)
    assert node.handle(Envelope({"ask": "hello"})).head["ask"] == "here"
    (tmp_path / "audit.jsonl").write_text(content)

    for act in (
        lambda: node.handle(Envelope({"ask": "hello"})),
        lambda: Node(SiteConfig(client="site_2"), tmp_path),
    ):
        with pytest.raises(UserError, match="line 1"):
            act()

    assert (tmp_path / "audit.jsonl").read_text() == content


@each_case("name", ["run", "ask", "number", "round"])
def test_node_refuses_numbers_with_thousands_of_digits(name: str, tmp_path: Path) -> None:
    lines: list[str] = []
    node = Node(SiteConfig(client="site_2"), tmp_path, lines.append, key=KEY)

    answer = node.handle(Envelope({"ask": "hello", name: 10**5000}))

    assert answer.head["ask"] == "refused"
    assert "<= 64 bits" in lines[-1]
    assert len(verify(node.audit_log.path)) == 1


def test_node_audit_checks_signatures_with_the_public_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, key = tmp_path / "state" / "audit.jsonl", make_node_key(tmp_path / "key")
    log = AuditLog(path, key)
    log.append(**ABOUT)
    key_options = ["--key", str(tmp_path / "key.pub"), "--head", log.head]
    requests = ["audit-log", str(path), *key_options]
    assert main(requests) == 0 and f"head: {log.head}" in capsys.readouterr().out
    assert main(requests[:2]) == 0 and "signatures were not checked" in capsys.readouterr().out

    path.write_bytes(path.read_bytes() + forged(path))

    assert main(requests) == 2 and "line 2: not signed" in capsys.readouterr().err


@each_case(
    ("head", "message"),
    [
        ("9" * 5000 + ":" + "a" * 64, "expected N:HASH"),
        ("\x1b[2J", "expected N:HASH"),
        ("9" * 18 + ":" + "a" * 64, "the log was truncated"),
        ("0:" + "f" * 64, "line 0: differs from a known head"),
    ],
)
def test_node_audit_refuses_unknown_head(
    head: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(written(tmp_path / "audit.jsonl", 2))
    assert main(["audit-log", path, "--head", f"0:{INITIAL_HASH}"]) == 0

    assert main(["audit-log", path, "--head", head]) == 2

    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_log_line_has_bounded_length(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append(
        **{
            **ABOUT,
            "outcome": "refused: " + "x" * 20_000_000,
            "kinds": ["y" * 10**6] * 1000,
            "run": "\ud800\x1b",
        }
    )
    assert log.path.stat().st_size < 20_000
    assert verify(log.path)[0]["run"] == "\\ud800\\x1b"


SECURE = {"channel__secure_sum": {"threshold": 2}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid, compressed": ("hybrid", {"channel": TOP, "models": MIXED}),
    "a secure sum": ("hybrid", {**SECURE, "models": MIXED}),
    "a cohort of some": ("fedavg", {"clients__per_round": 2}),
    "seldom read": ("fedproto", {"evaluation__every": 2}),
}


def counted(run: Run, folder: Path, name: str = "") -> tuple[int, int]:
    """Return the bytes sent and received in a run, from the sites' logs."""
    known = json.loads((run.path / "federation.json").read_text())["run"]
    found = [traffic_totals(verify(folder / site / "audit.jsonl"), known) for site in SITES]
    return sum(f.up for f in found), sum(f.down for f in found)


def recorded_bytes(run: Run) -> tuple[int, int]:
    """Return the bytes sent and received in a run, from the server's summary."""
    communication = run.summary["communication"]
    return communication["up_bytes"], communication["down_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_byte_counts_of_logs_match_the_server(case: str, tmp_path: Path) -> None:
    method, changes = CASES[case]
    federation = Federation(tmp_path)
    # whatever comes twice is counted once
    run_config = small(method, **changes, output__best_models=False)
    run = federation.serve(run_config, {"site_2": twice})
    assert counted(run, tmp_path) == recorded_bytes(run) and min(recorded_bytes(run)) > 0
    lines = verify(tmp_path / "site_2" / "audit.jsonl")
    again = [line for line in lines if line["outcome"] == "again"]
    assert len(again) == len([line for line in lines if line["ask"] == "do"]) / 2


@pytest.mark.slow
def test_log_names_the_kinds_of_sent_data(tmp_path: Path) -> None:
    run = Federation(tmp_path).serve(small("hybrid", MIXED))
    lines = [line for line in verify(tmp_path / "site_1" / "audit.jsonl") if line["ask"] == "do"]
    sent = {line["what"]: line["kinds"] for line in lines}
    trained = {"model: params", "logits: rows", "counts: counts", "training loss"}
    assert set(sent["train"]) == trained and sent["read"] == ["scores"]
    assert [line["round"] for line in lines if line["what"] == "train"] == [0, 1]
    assert run.summary["rounds_completed"] == 2


def test_log_marks_masked_uploads(tmp_path: Path) -> None:
    Federation(tmp_path).serve(small("fedavg", **SECURE))
    lines = [line for line in verify(tmp_path / "site_1" / "audit.jsonl") if line["ask"] == "do"]
    sent = [(line["what"], line["kinds"]) for line in lines if line["round"] == 0]
    assert sent == [
        ("keys", ["keys"]),
        ("shares", ["shares"]),
        ("train", ["masked sum of model: params, training loss"]),
        ("consistency", ["consistency"]),
        ("unmask", ["unmask"]),
    ]


def test_refused_upload_counts_no_bytes(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"site_3": {"allows": {"upload_bytes": 100}}})
    run = federation.serve(small(evaluation__every=2))
    assert counted(run, tmp_path) == recorded_bytes(run)
    log = traffic_totals(verify(tmp_path / "site_3" / "audit.jsonl"))
    assert log.up == 0 and log.down > 0

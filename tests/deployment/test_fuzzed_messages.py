"""Fuzzed messages: trees, headers and raw bytes are refused and have no other effect."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hetero_fl.communication import named_arrays
from hetero_fl.communication.compression import build_stages
from hetero_fl.communication.compressor import Compressor
from hetero_fl.communication.protocol import Message
from hetero_fl.communication.secure_aggregation.client import REPLIES, REQUESTS
from hetero_fl.communication.secure_aggregation.protocol import SecureAggregationServer
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.payload import (
    FORM as PAYLOAD,
    Item,
    ItemSpec,
    Payload,
    PayloadError,
    check_size,
    check_upload,
    loss_from_report,
)
from hetero_fl.data.federated_data import PACK_FORM as PACK
from hetero_fl.data.preprocessing import Preprocess
from hetero_fl.deployment.audit_log import verify
from hetero_fl.deployment.messages import FORM, RequestRefusedError, decode_body, message
from hetero_fl.deployment.transport import Envelope, find_violation
from hetero_fl.deployment.validation import read_data_info, read_evaluation, read_settings
from hetero_fl.experiment.preparation import prepare
from hetero_fl.utils.errors import RoundAbandonedError
from hetero_fl.utils.serialization import (
    MAX_HEADER_BYTES,
    MAX_HEADER_VALUES,
    CodecError,
    check_header,
    decode,
    encode,
)
from tests.support.cases import each_case
from tests.support.deployments import Federation, small
from tests.support.hostile_messages import (
    ANSWERS,
    HEADS,
    TREES,
    UPLOADS,
    Answer,
    bodies,
    bomb,
    hostile,
    raises_only,
    sealed,
    wire,
    with_header,
)
from tests.support.node_session import NodeSession

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(FUZZ, max_examples=4)
SPECS = {"model": ItemSpec("params"), "logits": ItemSpec("rows", share="predictions")}
LIKE = {
    "model": Item({"w": torch.zeros(4, 3)}, 1.0, "params"),
    "logits": Item(torch.zeros(6, 4), 1.0, "rows"),
}


# What is parsed


@pytest.mark.slow
@given(bodies(PAYLOAD))
@FUZZ
def test_payload_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    def receives() -> None:
        payload = Payload.decode(data)
        loss_from_report(payload.report)
        payload.encode()
        check_upload(payload, SPECS, LIKE)

    raises_only((PayloadError,), receives)


PARTS = [f"{place}/{part}" for place in "01" for part in ("values", "indices", "scales")]
VECTORS = st.one_of(
    st.binary(max_size=40).map(lambda data: torch.tensor(list(data), dtype=torch.uint8)),
    st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
)


@given(
    st.dictionaries(
        st.sampled_from([*PARTS, "shape/w", "plain/w", "shape/", ""]), VECTORS, max_size=4
    ),
    st.sampled_from(["model", "logits"]),
    st.booleans(),
)
@FUZZ
def test_compressed_message_of_any_tensors_is_read_or_refused(
    tensors: dict[str, torch.Tensor], name: str, upward: bool
) -> None:
    stages = build_stages(ChannelConfig(compress=[{"topk": 0.3}, {"quantize": 8}]).compress)
    compressor = Compressor(stages, SPECS, 4)
    got = Payload({"model": {"w": torch.zeros(4, 3)}})
    sent = Payload({name: Item(tensors, 1.0, SPECS[name].kind)})
    like = LIKE if upward else None
    raises_only((PayloadError,), lambda: compressor.decompress(sent, (0,), frozenset(), got, like))


@given(
    TREES,
    st.sampled_from(
        [
            fields
            for kinds in (
                REQUESTS,
                REPLIES,
            )
            for fields in kinds.values()
        ]
    ),
)
@FUZZ
def test_message_of_a_sum_of_any_tree_is_read_or_refused(tree: Any, fields: Any) -> None:
    data = wire(tree, named_arrays.FORM)
    raises_only((PayloadError,), lambda: named_arrays.decode_arrays(data, fields))


@given(TREES)
@FUZZ
def test_node_info_of_any_content_is_read_or_refused(tree: Any) -> None:
    tree = raised(wire(tree, FORM))
    for read in (
        lambda: read_data_info(tree, 3),
        lambda: read_data_info(tree, 3, Preprocess()),
        lambda: read_settings(tree, ()),
        lambda: read_settings({"settings": tree}, ()),
    ):
        raises_only((RequestRefusedError,), read)


def raised(data: bytes) -> Any:
    """Return the tree of a message, or None if decoding refuses it."""
    try:
        return decode_body(Envelope({}, data))
    except RequestRefusedError:
        return None


EVALUATION: dict[str, Any] = {
    "scores": {},
    "confusion": {},
    "calibration": {},
    "baselines": {},
    "forecast": {},
    "triggered": None,
    "model": None,
}


@pytest.fixture(scope="module")
def prepared() -> Any:
    return prepare(small(models="linear", rounds=1))


@given(
    tree=st.dictionaries(
        st.sampled_from(["scores", "confusion", "calibration", "baselines", "forecast", "model"]),
        TREES,
        min_size=3,
    )
    | TREES
)
@FUZZ
def test_evaluation_of_any_tree_is_read_or_refused(prepared: Any, tree: Any) -> None:
    values = raised(wire({**EVALUATION, **tree} if isinstance(tree, dict) else tree, FORM))
    raises_only(
        (RequestRefusedError,),
        lambda: read_evaluation(values, "site_1", prepared.federation, prepared.method),
    )


@given(header=st.binary(max_size=64) | bodies("hetero_fl model 1"))
@FUZZ
def test_evaluated_model_of_any_bytes_is_read_or_refused(prepared: Any, header: bytes) -> None:
    model = torch.frombuffer(bytearray(header or b"x"), dtype=torch.uint8)
    values = {**EVALUATION, "model": model}
    assert raises_only(
        (RequestRefusedError,),
        lambda: read_evaluation(values, "site_1", prepared.federation, prepared.method),
    )


# Bounds


@contextmanager
def peak_below(num_bytes: int) -> Iterator[None]:
    """Check that the memory of a context stays below a number of bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


@each_case("reader", ["payload", "message", "header", "values", "text"])
def test_header_of_ten_million_values_is_refused_unparsed(reader: str) -> None:
    data = bomb()
    readers: dict[str, Callable[[], object]] = {
        "payload": lambda: Payload.decode(data),
        "message": lambda: decode_body(Envelope({}, data)),
        "header": lambda: check_header(data),
        "values": lambda: decode(bomb(MAX_HEADER_VALUES), PAYLOAD),
        "text": lambda: decode(with_header(b'"' + b"x" * MAX_HEADER_BYTES + b'"'), PAYLOAD),
    }

    refusals = (PayloadError, RequestRefusedError, CodecError)
    with peak_below(5 * len(data)), pytest.raises(refusals, match="at most"):
        readers[reader]()


def test_header_of_large_model_is_accepted() -> None:
    names = {
        f"backbone.stages.{i}.blocks.0.attention.projection.weight": torch.zeros(1, 1, 1, 1)
        for i in range(10_000)
    }

    sent = Payload({"model": Item(names, 1.0, "params")}).encode()

    assert len(Payload.decode(sent)["model"]) == 10_000


def test_upload_much_longer_than_agreed_is_refused_unread() -> None:
    check_size(len(Payload(LIKE).encode()), SPECS, LIKE)
    with pytest.raises(PayloadError, match=r"expected at most [\d,]+ bytes, got 1,000,000"):
        check_size(1_000_000, SPECS, LIKE)


def test_header_much_longer_than_agreed_is_refused_unparsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    big = {
        "model": Item({"w": torch.zeros(400_000)}, 1.0, "params")
    }  # so long that a header of a megabyte is not too long
    sent = bomb(MAX_HEADER_VALUES // 4)
    check_size(len(sent), SPECS, big)
    assert len(Payload.decode(Payload(big).encode(), big)["model"]["w"]) == 400_000
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))

    with pytest.raises(PayloadError, match=r"header: expected at most 67,584 bytes, got [\d,]+"):
        Payload.decode(sent, big)


@pytest.mark.slow
@each_case("tree", [{f"layer.{i}.weight": torch.zeros(0) for i in range(34_000)}, [[]] * 262_000])
def test_header_with_too_many_values_is_refused(tree: Any) -> None:
    with pytest.raises(CodecError, match="at most"):
        decode(encode(tree, PAYLOAD), PAYLOAD)


def test_declared_size_is_refused_before_allocation() -> None:
    compressor = Compressor(build_stages(ChannelConfig(compress=[{"topk": 3}]).compress), {}, 4)
    item = Item({"w": torch.arange(40.0)}, 1.0, "update")
    sent = compressor.compress(Payload({"m": item}), (0,))
    assert len(compressor.decompress(sent, (0,))["m"]["w"]) == 40
    sent["m"]["shape/w"] = torch.empty(0, 2**40)

    with peak_below(2**20), pytest.raises(PayloadError, match="expected <= 1,073,741,824 values"):
        compressor.decompress(sent, (0,))


def test_answer_in_a_secure_sum_much_longer_than_agreed_is_refused_unread() -> None:
    conversation = SecureAggregationServer(
        {1: "site_1", 2: "site_2"}, 2, (bytes(32), 10), unit=0, round_idx=0
    )
    exchanges = conversation.exchanges()
    keys = next(exchanges)

    keys.accept("site_1", Message("keys", bytes(10**6)))

    with pytest.raises(RoundAbandonedError):
        next(exchanges)
    assert "reply to 'keys': must have at most" in conversation.dropouts["site_1"]


@each_case(
    ("envelope", "expected"),
    [
        (Envelope({}, bytes(11)), "message: must have <= 10 bytes, got 11"),
        (Envelope({str(i): i for i in range(99)}), "entries, got 99"),
        (Envelope({"why": "x" * 10**6}), "bytes, got 1,000,011"),
        (Envelope({"why": "\ud800"}), "head: expected valid Unicode"),
        (Envelope({"round": 2**70}), "head: numbers must have <= 64 bits, got 71"),
        (Envelope({"ask": ["x"]}), "got list"),  # type: ignore[dict-item]
    ],
)
def test_message_out_of_bounds_is_reported(envelope: Envelope, expected: str) -> None:
    assert expected in find_violation(envelope, 10)


# The server


def ends_well(folder: Path, answers: list[Answer]) -> list[dict[str, Any]]:
    """Run with one node that gives these answers, and check what the server writes.

    The other nodes take part in every round, and only plain text is written.
    """
    federation = Federation(folder)
    run_config = small(
        models="linear", rounds=len(answers), evaluation__every=len(answers), output__report=True
    )
    run = federation.serve(run_config, {"site_3": lambda handle: hostile(handle, answers)})
    assert run.summary["rounds_completed"] == len(answers)
    for record in run.metrics:
        assert set(record["failed"]) <= {"site_3"}
        assert all(
            reason.isprintable() and len(reason) < 500 for reason in record["failed"].values()
        )
    for name in ("metrics.jsonl", "log.txt", "summary.json", "status.json", "report.html"):
        text = (run.path / name).read_text(encoding="utf-8")
        assert "\x1b" not in text and "\u202e" not in text
    assert "<script>abc" not in (run.path / "report.html").read_text(encoding="utf-8")
    return list(run.metrics)


CRASHES: dict[str, tuple[Answer, str]] = {
    "a tensor at the root": (
        sealed(encode(torch.zeros(3), PAYLOAD)),
        "expected a dictionary of items",
    ),
    "a list at the root": (sealed(encode([1], PAYLOAD)), "expected a dictionary of items"),
    "a text at the root": (sealed(encode("x", PAYLOAD)), "expected a dictionary of items"),
    "nothing at the root": (sealed(encode(None, PAYLOAD)), "expected a dictionary of items"),
    "a number at the root": (sealed(encode(3.0, PAYLOAD)), "expected a dictionary of items"),
    "a surrogate at the root": (sealed(wire(["\udfff"], PAYLOAD)), "UnicodeEncodeError"),
    "a long report": (
        sealed(wire({"items": {}, "report": {"loss": "x" * 1000}}, PAYLOAD)),
        "report",
    ),
    "a report of many entries": (
        sealed(wire({"items": {}, "report": {str(i): 0 for i in range(100)}}, PAYLOAD)),
        "report",
    ),
    "a surrogate in a key": (
        sealed(wire({"items": {"\ud800": 1}, "report": {}}, PAYLOAD)),
        "UnicodeEncodeError",
    ),
    "a surrogate in a reason": (
        ({"ask": "refused", "why": "\ud800"}, None, False),
        "expected valid Unicode",
    ),
    "a loss without end": (
        sealed(wire({"items": {}, "report": {"loss": 10**400}}, PAYLOAD)),
        "report, 'loss'",
    ),
    "a loss of two numbers": (
        sealed(wire({"items": {}, "report": {"loss": torch.ones(2)}}, PAYLOAD)),
        "report, 'loss'",
    ),
    "thirty megabytes of lists": (sealed(bomb()), "expected at most"),
    "a header of many lists": (sealed(bomb(20_000)), "expected a dictionary of items"),
    "control characters": (
        ({"ask": "refused", "why": "\x1b[2J[/red]\u202e<script>abc"}, None, False),
        "\\x1b[2J",
    ),
    "a long name": (
        sealed(wire({"items": {"x" * 50_000: 1}, "report": {}}, PAYLOAD)),
        "item 'xxxxx",
    ),
    "a long head": (({"why": "x" * 10**6, "ask": "refused"}, None, False), "head: must have"),
}


def test_server_refuses_messages_that_crashed_it(tmp_path: Path) -> None:
    records = ends_well(tmp_path, [answer for answer, _ in CRASHES.values()])
    for (name, (_, expected)), record in zip(CRASHES.items(), records, strict=True):
        assert expected in record["failed"]["site_3"], (name, record["failed"])


@pytest.mark.slow
@given(answers=st.lists(ANSWERS, min_size=12, max_size=12))
@FEW
def test_server_survives_any_answers(
    tmp_path_factory: pytest.TempPathFactory, answers: list[Answer]
) -> None:
    ends_well(tmp_path_factory.mktemp("fuzz"), answers)


# A node


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> NodeSession:
    return NodeSession(tmp_path_factory.mktemp("asked"), models="linear", rounds=1)


@given(
    which=st.integers(0, 5),
    changes=HEADS,
    body=st.none()
    | bodies(FORM)
    | bodies(PAYLOAD)
    | UPLOADS.map(lambda tree: wire(tree, PAYLOAD))
    | bodies(PACK),
)
@FUZZ
def test_node_answers_any_message(
    session: NodeSession, which: int, changes: dict[str, Any], body: bytes | None
) -> None:
    messages = list(session.requests.values())
    honest = messages[min(which, len(messages) - 1)]
    log = session.node.audit_log.path
    before = log.stat().st_size
    changes = {name: value for name, value in changes.items() if name != "ask" or which != 5}

    answer = session.node.handle(
        Envelope({**honest.head, **changes}, honest.body if body is None else body)
    )

    assert find_violation(answer, 2**20) == ""
    assert log.stat().st_size - before < 2000
    assert all(line.isprintable() and len(line) < 600 for line in session.federation.log_lines)


def test_node_continues_after_any_message(session: NodeSession) -> None:
    answers = [session.repeat(kind).head["ask"] for kind in ("hello", "terms", "join")]
    assert answers == ["here", "told", "ready"]
    assert all(len(json.dumps(entry)) < 2000 for entry in verify(session.node.audit_log.path))


def test_node_ignores_thread_counts_of_the_server(session: NodeSession) -> None:
    tree = {**decode_body(session.requests["join"]), "threads": 10**6}
    session.repeat("terms")

    reason = session.refusal_reason("join", encode(tree, FORM))

    assert reason == "'join': threads: must be <= 1024, got 1000000"


def test_large_request_is_logged_in_a_short_line(session: NodeSession) -> None:
    long = "x" * 20_000_000
    log = session.node.audit_log.path
    for envelope in (
        Envelope({"ask": "do", "run": "r", "round": long}),
        Envelope({"ask": long}),
        message("terms", {"config": {"name": long}, "public": ""}, run="r"),
        message("terms", {"config": {long: 1}, "public": ""}, run="r"),
        message(
            "terms",
            {"config": {"name": long[: 10**6], "rounds": long[: 10**6]}, "public": ""},
            run="r",
        ),
    ):
        before = log.stat().st_size
        answer = session.node.handle(envelope)
        assert answer.head["ask"] == "refused" and len(str(answer.head["why"])) <= 400
        assert log.stat().st_size - before < 1500


def test_node_refuses_oversized_message_before_parsing(session: NodeSession) -> None:
    data = bomb(form=FORM)

    with peak_below(5 * len(data)):
        answer = session.node.handle(Envelope({"ask": "terms", "run": "r"}, data))

    assert "at most" in str(answer.head["why"])

"""Malformed trees, headers and bytes drawn by Hypothesis, and a node that sends them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, Phase, given, settings

from hetero_fl.core.payload import FORM as PAYLOAD
from hetero_fl.deployment.messages import FORM
from hetero_fl.deployment.transport import Envelope, Handle
from hetero_fl.utils.serialization import encode

T = TypeVar("T")

SURROGATES = st.sampled_from(["\ud800", "a\udfff", "\ud83dx"])
CONTROLS = st.sampled_from(["\x1b[2J", "\u202eabc", "a\nb", "\x00", "[/red]", "<script>"])
TEXTS = st.text(max_size=8) | SURROGATES | CONTROLS
NUMBERS = (
    st.integers(-3, 3)
    | st.floats()
    | st.sampled_from([10**400, -(10**400), 2**64, 2**63, 1e308, float("nan"), float("inf")])
)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(0, 3), max_size=3) | st.just([1] * 40)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype), SHAPES, st.sampled_from(DTYPES)
)

# Keys of real messages, so that trees pass the first check.
KEYS = """
rows hash view labels train validation test settings model shares preprocess augment items
report values weight kind loss config public told fingerprint threads pack state tag keys
numbers vector broadcast head scores confusion calibration baselines forecast triggered
personal accuracy mean std resize
"""
NAMES = st.sampled_from(KEYS.split())
METADATA = st.just("__metadata__")
TREES = st.recursive(
    PLAIN | TENSORS,
    lambda t: st.lists(t, max_size=3) | st.dictionaries(NAMES | TEXTS, t, max_size=4),
    max_leaves=12,
)
ITEMS = st.fixed_dictionaries(
    {
        "values": TENSORS | st.dictionaries(NAMES | TEXTS, TENSORS, max_size=3) | PLAIN,
        "weight": NUMBERS | TENSORS | PLAIN,
        "kind": st.sampled_from(["params", "update", "rows", "class_sums", "counts"]) | PLAIN,
    }
)
UPLOADS = st.fixed_dictionaries(
    {
        "items": st.dictionaries(NAMES | TEXTS, ITEMS, max_size=3) | PLAIN,
        "report": st.dictionaries(NAMES | TEXTS, PLAIN | TENSORS, max_size=3) | PLAIN,
    }
)
HEAD_KEYS = """
ask client why task what state check run round again work kind base expires details spare
fingerprint log answers number
"""
HEAD_NAMES = st.sampled_from(HEAD_KEYS.split())
STATUSES = st.sampled_from(["done", "refused", "failed", "x" * 10**5])
HEADS = st.dictionaries(
    HEAD_NAMES | TEXTS,
    PLAIN | st.binary(max_size=8) | STATUSES,
    max_size=8,
)


def wire(tree: Any, form: str) -> bytes:
    """Return the tree as bytes, including content that `encode` would refuse."""
    tensors: list[torch.Tensor] = []

    def flat(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return {"t": str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {"d": {str(key): flat(each) for key, each in value.items()}}
        return [flat(each) for each in value] if isinstance(value, list) else value

    plain = flat(tree)
    data = encode(tensors, form)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"hetero_fl": json.dumps({"form": form, "tree": plain})}
    return with_header(json.dumps(header).encode(), data[8 + size :])


def with_header(header: bytes, rest: bytes = b"") -> bytes:
    """Return a safetensors file with this header."""
    return len(header).to_bytes(8, "little") + header + rest


def bomb(values: int = 10_000_000, form: str = PAYLOAD) -> bytes:
    """Return lists that take three bytes each and fifty times as much memory when parsed."""
    metadata = f'{{"form":"{form}","tree":[{"[]," * values}[]]}}'
    return with_header(json.dumps({"__metadata__": {"hetero_fl": metadata}}).encode())


def bodies(form: str) -> st.SearchStrategy[bytes]:
    """Return a strategy for message bodies, from valid ones with any tree to random bytes."""
    trees = st.builds(wire, TREES | UPLOADS, st.just(form) | st.just(form) | TEXTS)
    cut = st.builds(lambda data, at: data[: int(at * len(data))], trees, st.floats(0, 1))
    changed = st.builds(
        lambda data, at, to: (
            data[: int(at * len(data))] + bytes([to]) + data[int(at * len(data)) + 1 :]
        ),
        trees,
        st.floats(0, 0.99),
        st.integers(0, 255),
    )
    headers = st.builds(
        lambda value: with_header(json.dumps(value).encode()),
        st.recursive(
            PLAIN,
            lambda t: st.lists(t, max_size=3) | st.dictionaries(METADATA | TEXTS, t, max_size=3),
            max_leaves=8,
        ),
    )
    return trees | cut | changed | headers | st.binary(max_size=64)


ANSWERS = st.tuples(HEADS, bodies(PAYLOAD) | bodies(FORM) | st.none(), st.booleans())
Answer = tuple[dict[str, Any], bytes | None, bool]


def hostile(handle: Handle, answers: list[Answer]) -> Handle:
    """Return a node that changes the head, and possibly the body, of its answers."""
    left = list(answers)

    def handles(requests: Envelope) -> Envelope:
        answer = handle(requests)
        if requests.head.get("ask") != "do" or not left:
            return answer
        changes, body, sealed = left.pop(0)
        body = answer.body if body is None else body
        head = {**answer.head, **changes}
        if sealed:
            head["check"] = hashlib.sha256(body).hexdigest()
        return Envelope(head, body)

    return handles


def sealed(body: bytes) -> Answer:
    """Return these bytes sealed as a valid upload."""
    return {}, body, True


def examples(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """Return so many different examples of a strategy, the same ones in every run.

    For tests that need all of them at once, because the first example that `given` draws is a
    list of equal values.
    """
    found: dict[str, T] = {}

    @given(strategy)
    @settings(
        max_examples=3 * count,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    def collect(example: T) -> None:
        found.setdefault(repr(example), example)

    collect()
    assert len(found) >= count
    return list(found.values())[-count:]


def raises_only(
    expected: tuple[type[BaseException], ...], call: Callable[[], object]
) -> BaseException | None:
    """Call a function and return the expected exception that it raised, if any.

    Other exceptions propagate. The call may take two seconds of processor time at most.
    """
    started = time.process_time()
    try:
        call()
    except expected as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        str(error).encode()
        return error
    finally:
        assert time.process_time() - started < 2
    return None

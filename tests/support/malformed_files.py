"""Malformed files and folders for all readers, by a seeded generator, and a check of a reader."""

from __future__ import annotations

import faulthandler
import io
import os
import random
import re
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hetero_fl.config.data import SourceConfig
from hetero_fl.data import load_source
from hetero_fl.experiment.configuration import load_config
from hetero_fl.reporting.integrity import verify
from hetero_fl.utils.errors import UserError
from tests.support import benchmark_folders, movielens_folders, speech_folders
from tests.support.image_folders import make_image_folder, write_image_table
from tests.support.run_directories import Case, write_run

SECONDS = 20
KIBIBYTES = 2**20
"""Memory above the process before that a reader may use."""
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
CONFIG = "name: a\nrounds: 3\ndata: {name: digits}\nclients: {count: 2, defaults: {model: mlp}}\n"
FRAME = pd.DataFrame({"age": np.arange(40) * 1.5, "y": np.arange(40) % 2})
ACTIVITY = FRAME.assign(activity=["walk"] * 20 + ["sit"] * 20)
HASHING = {"text": {"tokenizer": "hashing"}}
IMAGES = {"train_images": np.full((30, 8, 8), 7, np.uint8), "train_labels": np.arange(30) % 2}
WINDOWS = {"x": np.ones((30, 8, 2)), "y": np.arange(30) % 2, "columns": ["a", "b"]}
EVENTS: deque[tuple[str, Any]] = deque(maxlen=10_000)
"""The last files that this process opened and processes that it started."""


class Reader(NamedTuple):
    """A function that fills a folder, and the source that reads it, or a file in it."""

    write: Callable[[Path], Any]
    source: str
    file: str = ""
    keys: dict[str, Any] = {}

    def read(self, folder: Path) -> None:
        """Read all rows, or a run, or a configuration."""
        if self.source == "run":
            verify(folder)
        elif self.source == "config":
            load_config(folder / self.file)
        else:
            path = {"name": self.source, "path": str(folder / self.file)}
            place = {"name": f"hf:{folder}"} if self.source == "hf" else path
            source = SourceConfig.model_validate({**place, **self.keys})
            load_source(source, folder.parent / "downloads", missing=True)


READERS = (
    Reader(lambda p: np.savez(p / "a.npz", **IMAGES), "npz", "a.npz"),
    Reader(lambda p: FRAME.to_csv(p / "a.csv"), "table", "a.csv", {"label": "y"}),
    Reader(lambda p: FRAME.to_csv(p / "a.tsv", sep="\t"), "table", "a.tsv", {"label": "y"}),
    Reader(lambda p: FRAME.to_parquet(p / "a.parquet"), "table", "a.parquet", {"label": "y"}),
    Reader(lambda p: make_image_folder(p, 9), "image_folder"),
    Reader(lambda p: make_image_folder(p, 9), "image_folder", "", {"stream": True}),
    Reader(lambda p: make_image_folder(p, 9, suffix="jpg"), "image_folder"),
    Reader(lambda p: make_image_folder(p, 9, suffix="tif"), "image_folder"),
    Reader(lambda p: benchmark_folders.write_camelyon17(p, 1), "camelyon17", "", {"size": 8}),
    Reader(lambda p: benchmark_folders.write_iwildcam(p, 9), "iwildcam", "", {"size": 8}),
    Reader(write_image_table, "image_table", "rows.csv", {"file": "file", "label": "y"}),
    Reader(
        write_image_table, "image_table", "rows.csv", {"file": "{site}/{number}.png", "label": "y"}
    ),
    Reader(speech_folders.write_speech_folder, "speech"),
    Reader(lambda p: (p / "a.txt").write_text("the cat sat on the mat\n" * 9), "text", "", HASHING),
    Reader(lambda p: movielens_folders.write_movielens_folder(p, "latest"), "movies"),
    Reader(lambda p: movielens_folders.write_movielens_folder(p, "1m"), "movies"),
    Reader(lambda p: benchmark_folders.write_client_folder(p, 1), "htfllib"),
    Reader(benchmark_folders.write_femnist, "leaf"),
    Reader(lambda p: np.savez(p / "a.npz", **WINDOWS), "activity", "a.npz"),
    Reader(lambda p: ACTIVITY.to_csv(p / "a.csv"), "activity", "a.csv", {"windows": {"length": 5}}),
    Reader(lambda p: make_image_folder(p, 9), "hf"),
    Reader(lambda p: FRAME.to_parquet(p / "train.parquet"), "hf", "", {"label": "y"}),
    Reader(lambda p: (p / "a.yaml").write_text(CONFIG), "config", "a.yaml"),
    Reader(lambda p: write_run(p, Case()), "run"),
)


def _damage(content: bytes, rng: random.Random) -> bytes:
    """Return bytes of which some are removed, repeated, zeroed or inserted."""
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    middle = content[start:stop]
    noise = rng.randbytes(rng.randrange(1, 40))
    changed = rng.choice([b"", middle * 2, noise, bytes(len(middle)), middle + noise])
    return content[:start] + changed + (content[stop:] if rng.random() < 0.8 else b"")


def _announce(content: bytes, rng: random.Random) -> bytes:
    """Return bytes with large numbers, or an archive with an array of another header."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return re.sub(rb"\d+", lambda _: b"1" + b"0" * rng.randrange(18), content, count=3)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w", 8) as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            header = io.BytesIO()
            shape = (10 ** rng.randrange(12),) * rng.randrange(4)
            code = rng.choice(["|u1", "<f8", "|O", "<U99999", "|V9"])
            described = {"shape": shape, "fortran_order": False, "descr": code}
            np.lib.format.write_array_header_1_0(header, described)
            body = b"\x80\x02Nr\x00\x00\x00\x08." if code == "|O" else bytes(rng.randrange(10**7))
            new.writestr(name, header.getvalue() + body if name == chosen else old.read(name))
    return changed.getvalue()


def _expand(content: bytes, rng: random.Random) -> bytes:
    """Return text with names that leave the folder, or with aliases or references that expand."""
    name = rng.choice([b"../../outside", b"/dev/zero", b"\x1b[2J\x00\n"])
    changed = re.sub(rb"[\w/]+\.(png|jpg|wav|npz|json|csv)", name, content)
    first, line = rng.choice(
        [
            ("&a0 [x]", "&a{} [*a{}, *a{}]"),
            ("x", "'${{a{1}}}${{a{1}}}'"),
            ("&a0 {x: 1}", "&a{} {{<<: [*a{}, *a{}]}}"),
        ]
    )
    lines = (f"a{i}: {line.format(i, i - 1, i - 1)}" for i in range(1, rng.randrange(8, 33)))
    return (
        changed
        if changed != content
        else content + "\n".join(["", f"a0: {first}", *lines]).encode()
    )


def write_case(number: int, folder: Path) -> tuple[Reader, str]:
    """Write the malformed file or folder of a case to `folder/data`.

    Args:
        number: Number of the case, which is the seed.
        folder: Empty folder. Its entry `outside` is not in the folder of the reader.

    Returns:
        The reader, and a description of the case.
    """
    rng = random.Random(number)
    reader = READERS[number // 10 % len(READERS)]
    data = folder / "data"
    data.mkdir()
    reader.write(data)
    path = rng.choice(sorted(file for file in data.rglob("*") if file.is_file()))
    content = path.read_bytes()
    kind = rng.choice(["damage", "damage", "announce", "expand", "postscript", "link", "pipe"])
    if kind in ("link", "pipe") and not reader.file:
        (folder / "outside").write_bytes(content)
        path.unlink()
        target = rng.choice([folder / "outside", folder, Path("/dev/zero"), path, Path("missing")])
        os.mkfifo(path) if kind == "pipe" else path.symlink_to(target)
    else:
        change = {"damage": _damage, "announce": _announce, "expand": _expand}.get(kind)
        path.write_bytes(change(content, rng) if change else EPS)
    return reader, f"{number}: {reader.source}: {kind} of {path.relative_to(data)}"


def record_events() -> None:
    """Record files that are opened and processes that are started until the process ends."""
    watched = ("open", *PROCESSES)
    sys.addaudithook(
        lambda event, args: EVENTS.append((event, args[0])) if event in watched else None
    )


def _memory(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def check_case(number: int, folder: Path) -> tuple[str, str]:
    """Read the file or folder of a case.

    Returns:
        "read" or "refused", or what the reader must not do, and a description of the case.
    """
    reader, title = write_case(number, folder)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    started = time.monotonic()
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
    EVENTS.clear()
    outcome = "read"
    try:
        reader.read(folder / "data")
    except UserError as error:
        outcome = "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    events = list(EVENTS)
    faulthandler.cancel_dump_traceback_later()
    used = _memory("VmHWM") - before
    seconds = time.monotonic() - started
    places = [os.path.realpath(str(value)) for event, value in events if event == "open"]
    foreign = [p for p in places if p.startswith((str(folder / "outside"), "/dev/zero"))]
    foreign += [f"{event} {value}" for event, value in events if event != "open"]
    if used > KIBIBYTES or seconds > SECONDS or foreign:
        outcome = f"{used // 1024} MiB, {seconds:.0f} s, {foreign}"
    return outcome, title

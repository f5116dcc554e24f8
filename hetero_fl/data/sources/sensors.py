"""Windows of an accelerometer and a gyroscope worn by persons: generated, or cut from a local file.

*Generated.* 64 samples of six channels: acceleration in g (ax, ay, az) and angular velocity in rad/s (gx, gy, gz). Six
activities. Along each axis of the body a moving one is a sum of three harmonics of its cadence (in Hz), from a random moment on,

    a(t) = gravity + Σ_axis Σ_h strength[axis] / h · share[h] · sin(h · (2π · cadence · t + phase[axis])) + noise

and the angular velocity the same with strengths of its own; sitting and standing are gravity and noise, told apart by how the
body leans. What differs between persons: the *placement* of the device turns all vectors and scales them (wrist, pocket, belt,
each with a tilt of the person's own), the *rate* is 25 or 50 samples a second (so that a window shows 2.6 or 1.3 seconds),
cadence and strength have a factor of the person's own (σ 0.08 and 0.15, log-normal), and so has the noise of the device. A
person does the six in a mix of its own (Dirichlet, 1) in 160 to 320 windows. The common validation and test sets are of persons
that nobody trains on, six activities alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hetero_fl.config.data import SourceConfig, WindowsConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples
from hetero_fl.data.registry import register_source
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.seeding import keyed_numpy_generator

CHANNELS = ("ax", "ay", "az", "gx", "gy", "gz")
LENGTH = 64
PERSONS = 9
VALIDATED = 6
TESTED = 12
WINDOWS = 60  # of each person of the common sets
ABOUT = (
    "generated: six activities of persons who wear a device at the wrist, in a pocket, at the belt"
)
RATES = (25, 50)
PLACEMENTS = {
    "wrist": (1.0, (0.4, 0.1, 0.3)),
    "pocket": (0.8, (0.1, 0.5, 0.0)),
    "belt": (0.6, (0.0, 0.1, 0.1)),
}
"""Scale, and rotation about x, y and z in radians."""


@dataclass(frozen=True)
class Motion:
    """An activity: cadence in Hz, strengths along the body's axes (forward, sideways, up) of acceleration (g) and of angular
    velocity (rad/s), shares of the harmonics, how far the body leans forward (radians)."""

    cadence: float
    push: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shares: tuple[float, float, float] = (1.0, 0.5, 0.3)
    lean: float = 0.0


ACTIVITIES = {
    "cycle": Motion(1.2, (0.15, 0.1, 0.1), (0.2, 0.2, 2.2), (1.0, 0.2, 0.1), 0.6),
    "run": Motion(2.7, (0.6, 0.3, 1.3), (1.6, 0.8, 1.2), (1.0, 0.7, 0.5), 0.15),
    "sit": Motion(0.3, lean=0.9),
    "stairs": Motion(1.4, (0.5, 0.15, 0.4), (1.8, 0.4, 0.3), (1.0, 0.9, 0.2), 0.35),
    "stand": Motion(0.3, lean=0.0),
    "walk": Motion(1.9, (0.2, 0.2, 0.5), (0.6, 0.9, 0.6), (1.0, 0.5, 0.4), 0.05),
}
NAMES = tuple(ACTIVITIES)
PHASES = np.array([0.0, 0.9, 1.8])  # of the axes


@dataclass(frozen=True)
class Person:
    """Who wears a device, where and which: `turned` `[3, 3]` takes the body's axes to the device's."""

    placement: str
    rate: int
    cadence: float
    strength: float
    noise: float
    turned: np.ndarray


@register_source("activity", keys=("path", "label", "group", "windows"), generates=True)
def activity(config: SourceConfig, root: Path) -> Dataset:
    """Generated persons; or with `path` a file of one's own, see `hetero_fl.data.sources.recordings`."""
    if config.path is not None:
        from hetero_fl.data.sources.recordings import read_recorded  # loads pandas

        path = Path(config.path).expanduser()
        cut = config.windows or WindowsConfig()
        return read_recorded(path, cut, config.label, config.group)
    for name in ("label", "group", "windows"):
        if getattr(config, name) is not None:
            raise UserError(f"{name}: is for a file, but there is no path; leave it out")
    windows = []
    done = []
    for number in range(PERSONS):
        draws = keyed_numpy_generator("data", "activity", "person", number)
        y = draws.choice(
            len(NAMES), int(draws.integers(160, 321)), p=draws.dirichlet([1.0] * len(NAMES))
        )
        windows.append(record(person(number), y, draws))
        done.append(y)
    owners = torch.repeat_interleave(torch.arange(PERSONS), torch.tensor([len(y) for y in done]))
    x = torch.from_numpy(np.concatenate(windows))
    labels = torch.from_numpy(np.concatenate(done))
    train = Examples(x, labels, owners, tuple(f"person_{i + 1}" for i in range(PERSONS)))
    validation = _draw_constants(range(PERSONS, PERSONS + VALIDATED))
    test = _draw_constants(range(PERSONS + VALIDATED, PERSONS + VALIDATED + TESTED))
    task = Task("multiclass", len(NAMES), NAMES)
    return Dataset("activity", task, train, validation, test, True, ABOUT, CHANNELS)


def person(number: int) -> Person:
    """The person of that number; placements and rates in turn."""
    draws = keyed_numpy_generator("data", "activity", "device", number)
    placement = tuple(PLACEMENTS)[number % len(PLACEMENTS)]
    rate = RATES[number // len(PLACEMENTS) % len(RATES)]
    angles = np.array(PLACEMENTS[placement][1]) + draws.normal(0, 0.1, 3)
    cadence, strength = np.exp(draws.normal(0, [0.08, 0.15]))
    return Person(
        placement,
        rate,
        float(cadence),
        float(strength),
        float(draws.uniform(0.03, 0.09)),
        _rotation(angles),
    )


def record(person: Person, y: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """A window of each of these activities (places in `NAMES`), float32 `[N, 64, 6]`."""
    n = len(y)
    motions = tuple(ACTIVITIES.values())
    time = np.arange(LENGTH) / person.rate
    cadence = (
        np.array([m.cadence for m in motions])[y]
        * person.cadence
        * np.exp(draws.normal(0, 0.04, n))
    )
    shares = np.array([m.shares for m in motions])[y]
    # a window begins anywhere in a step
    turns = 2 * np.pi * (cadence[:, None] * time + draws.uniform(size=(n, 1)))
    scale = PLACEMENTS[person.placement][0] * person.strength
    found = []
    for strengths in ([m.push for m in motions], [m.turn for m in motions]):
        # [window, time, axis, harmonic]
        angle = np.arange(1, 4) * (turns[..., None, None] + PHASES[:, None])
        # [window, time, axis]
        waves = (np.sin(angle) * (shares / np.arange(1, 4))[:, None, None]).sum(-1)
        found.append(scale * np.array(strengths)[y][:, None] * waves)
    lean = np.array([m.lean for m in motions])[y] + draws.normal(0, 0.08, n)
    found[0] = found[0] + np.stack([np.sin(lean), np.zeros(n), np.cos(lean)], 1)[:, None]
    both = np.concatenate([vectors @ person.turned.T for vectors in found], axis=2)
    noise = person.noise * np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    return np.asarray(both + noise * draws.normal(size=both.shape), dtype=np.float32)


def _draw_constants(numbers: range) -> Examples:
    y = np.tile(np.arange(len(NAMES)), WINDOWS // len(NAMES))
    x = np.concatenate(
        [
            record(person(number), y, keyed_numpy_generator("data", "activity", "common", number))
            for number in numbers
        ]
    )
    return Examples(torch.from_numpy(x), torch.from_numpy(np.tile(y, len(numbers))))


def _rotation(angles: np.ndarray) -> np.ndarray:
    """About x, then y, then z; `[3, 3]`."""
    whole = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i = (axis + 1) % 3
        j = (axis + 2) % 3
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        whole = turn @ whole
    return whole

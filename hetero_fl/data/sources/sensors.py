"""Activity recognition from accelerometer and gyroscope windows, generated or read from a file.

Generated windows have 64 samples of six channels: acceleration in g (ax, ay, az) and angular
velocity in rad/s (gx, gy, gz). The persons differ in the placement, sampling rate and noise of the
device, in the cadence and strength of their motions, and in their mix of six activities.
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
VALIDATION_PERSONS = 6
TEST_PERSONS = 12
WINDOWS = 60
"""Number of windows of each person in the global validation and test sets."""
ABOUT = (
    "generated: six activities of persons who wear a device at the wrist, in a pocket, at the belt"
)
RATES = (25, 50)
PLACEMENTS = {
    "wrist": (1.0, (0.4, 0.1, 0.3)),
    "pocket": (0.8, (0.1, 0.5, 0.0)),
    "belt": (0.6, (0.0, 0.1, 0.1)),
}
"""Scale of motions and rotation of the device about x, y, z in radians, keyed by placement."""


@dataclass(frozen=True)
class Motion:
    """An activity, modeled as periodic motion.

    Attributes:
        cadence: Frequency in Hz.
        push: Amplitudes of the acceleration in g along the body axes (forward, sideways, up).
        turn: Amplitudes of the angular velocity in rad/s about the body axes.
        shares: Relative amplitudes of three harmonics.
        lean: Angle by which the body leans forward, in radians.
    """

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
PHASES = np.array([0.0, 0.9, 1.8])
"""Phase of each axis in radians."""


@dataclass(frozen=True)
class Person:
    """A person with a device.

    Attributes:
        placement: Placement of the device, a key of `PLACEMENTS`.
        rate: Sampling rate in Hz.
        cadence: Factor by which the cadence of all activities is multiplied.
        strength: Factor by which the amplitudes of all motions are multiplied.
        noise: Standard deviation of the noise of the device.
        rotation: Rotation from body axes to device axes, shape `[3, 3]`.
    """

    placement: str
    rate: int
    cadence: float
    strength: float
    noise: float
    rotation: np.ndarray


@register_source("activity", keys=("path", "label", "group", "windows", "read"), generates=True)
def activity(config: SourceConfig, _root: Path) -> Dataset:
    """Generate activities of nine persons (groups), or read a file (see `read_recorded`).

    Each person has 160 to 320 windows, with shares of the activities sampled from a uniform
    Dirichlet distribution. The validation and test sets contain other persons, with balanced
    activities.
    """
    if config.path is not None:
        # Imported here because loading pandas is slow.
        from hetero_fl.data.sources.recordings import read_recorded

        path = Path(config.path).expanduser()
        windows = config.windows or WindowsConfig()
        return read_recorded(path, windows, config.label, config.group, config.read)
    for key in ("label", "group", "windows", "read"):
        if getattr(config, key) is not None:
            raise UserError(f"{key}: needs path, as it describes a file; set path or remove it")
    recordings = []
    activities = []
    for number in range(PERSONS):
        rng = keyed_numpy_generator("data", "activity", "person", number)
        y = rng.choice(len(NAMES), int(rng.integers(160, 321)), p=rng.dirichlet([1.0] * len(NAMES)))
        recordings.append(record(make_person(number), y, rng))
        activities.append(y)
    counts = torch.tensor([len(y) for y in activities])
    owners = torch.repeat_interleave(torch.arange(PERSONS), counts)
    x = torch.from_numpy(np.concatenate(recordings))
    labels = torch.from_numpy(np.concatenate(activities))
    train = Examples(x, labels, owners, tuple(f"person_{i + 1}" for i in range(PERSONS)))
    first_test = PERSONS + VALIDATION_PERSONS
    validation = _make_common_set(range(PERSONS, first_test))
    test = _make_common_set(range(first_test, first_test + TEST_PERSONS))
    task = Task("multiclass", len(NAMES), NAMES)
    return Dataset("activity", task, train, validation, test, True, ABOUT, CHANNELS)


def make_person(number: int) -> Person:
    """Generate the person with a given number, which determines placement and sampling rate."""
    rng = keyed_numpy_generator("data", "activity", "device", number)
    placement = tuple(PLACEMENTS)[number % len(PLACEMENTS)]
    rate = RATES[number // len(PLACEMENTS) % len(RATES)]
    angles = np.array(PLACEMENTS[placement][1]) + rng.normal(0, 0.1, 3)
    cadence, strength = np.exp(rng.normal(0, [0.08, 0.15]))
    return Person(
        placement,
        rate,
        float(cadence),
        float(strength),
        float(rng.uniform(0.03, 0.09)),
        _rotation_matrix(angles),
    )


def record(person: Person, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Generate a window of sensor samples for each activity in `y`.

    Along each body axis, the signal is a sum of three harmonics of the cadence,
    `sum_h amplitude * share[h] / h * sin(h * (2 pi * cadence * t + phase))` for h = 1, 2, 3. The
    amplitude is that of the activity, multiplied by the scale of the placement and the strength of
    the person. Gravity is added to the acceleration. Then both vectors are rotated to the axes of
    the device, and noise is added.

    Args:
        person: Person who wears the device.
        y: Activities as indices into `NAMES`, int64 `[N]`.
        rng: Random generator.

    Returns:
        Windows, float32 `[N, 64, 6]`.
    """
    n = len(y)
    motions = tuple(ACTIVITIES.values())
    time = np.arange(LENGTH) / person.rate
    cadence = (
        np.array([m.cadence for m in motions])[y] * person.cadence * np.exp(rng.normal(0, 0.04, n))
    )
    shares = np.array([m.shares for m in motions])[y]
    # A window starts at a random phase.
    turns = 2 * np.pi * (cadence[:, None] * time + rng.uniform(size=(n, 1)))
    scale = PLACEMENTS[person.placement][0] * person.strength
    vectors = []
    for strengths in ([m.push for m in motions], [m.turn for m in motions]):
        # [window, time, axis, harmonic]
        angle = np.arange(1, 4) * (turns[..., None, None] + PHASES[:, None])
        # [window, time, axis]
        waves = (np.sin(angle) * (shares / np.arange(1, 4))[:, None, None]).sum(-1)
        vectors.append(scale * np.array(strengths)[y][:, None] * waves)
    lean = np.array([m.lean for m in motions])[y] + rng.normal(0, 0.08, n)
    vectors[0] = vectors[0] + np.stack([np.sin(lean), np.zeros(n), np.cos(lean)], 1)[:, None]
    channels = np.concatenate([vector @ person.rotation.T for vector in vectors], axis=2)
    noise = person.noise * np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
    return np.asarray(channels + noise * rng.normal(size=channels.shape), dtype=np.float32)


def _make_common_set(numbers: range) -> Examples:
    y = np.tile(np.arange(len(NAMES)), WINDOWS // len(NAMES))
    windows = [
        record(make_person(number), y, keyed_numpy_generator("data", "activity", "common", number))
        for number in numbers
    ]
    x = np.concatenate(windows)
    return Examples(torch.from_numpy(x), torch.from_numpy(np.tile(y, len(numbers))))


def _rotation_matrix(angles: np.ndarray) -> np.ndarray:
    """Return the matrix of a rotation about x, then y, then z, shape `[3, 3]`."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i = (axis + 1) % 3
        j = (axis + 2) % 3
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j] = -np.sin(angle)
        turn[j, i] = np.sin(angle)
        rotation = turn @ rotation
    return rotation

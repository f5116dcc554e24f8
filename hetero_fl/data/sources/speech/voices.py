"""Generated voices: words as sequences of sounds, spoken by persons and recorded by devices.

A recording has 16,000 samples per second and lasts one second. The voices are a rough imitation of
speech (a source and filters, as in Klatt, "Software for a cascade/parallel formant synthesizer",
1980). They differ in what matters for a comparison of methods: pitch, vocal tract, accent, pace,
noise, echo and bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hetero_fl.utils.seeding import keyed_numpy_generator

RATE = 16_000
SAMPLES = RATE
"""Number of samples of a recording."""
HOP = 256
"""Samples between two frames of the synthesis."""
FRAME = 512
"""Samples of a frame of the synthesis."""
FRAMES = SAMPLES // HOP + 1
SPOKEN_SHARE = 0.4
"""Approximate share of a recording in which the person speaks."""
LEVEL = 0.1
"""Root mean square of a voice in a recording, where 1 is the maximum of a file."""
SMOOTHING = 3
"""Number of frames over which one sound changes to the next."""
BANDWIDTHS = (80.0, 100.0, 150.0)
"""Bandwidths of the three formants in Hz."""
UPPER_FORMANTS = ((3500.0, 250.0), (4500.0, 350.0))
"""Frequency and bandwidth in Hz of the formants that are the same in all sounds."""


@dataclass(frozen=True)
class Sound:
    """A sound of speech.

    Attributes:
        seconds: Typical duration.
        formants: Frequencies of the first three resonances of the vocal tract in Hz.
        voice: Amplitude of the vibration of the vocal cords.
        noise: Amplitude of the noise of the breath.
        center: Center of the noise in Hz.
        width: Width of the noise in Hz.
    """

    seconds: float
    formants: tuple[float, float, float]
    voice: float = 1.0
    noise: float = 0.0
    center: float = 0.0
    width: float = 1.0


NEUTRAL = (500.0, 1500.0, 2500.0)
# The formants of vowels are those of men in Peterson & Barney (1952).
SOUNDS = {
    "AA": Sound(0.16, (730, 1090, 2440)),
    "AE": Sound(0.12, (660, 1720, 2410)),
    "AH": Sound(0.14, (640, 1190, 2390)),
    "AO": Sound(0.14, (570, 840, 2410)),
    "EH": Sound(0.15, (530, 1840, 2480)),
    "IH": Sound(0.10, (390, 1990, 2550)),
    "UH": Sound(0.10, (440, 1020, 2240)),
    "L": Sound(0.07, (360, 1300, 2700), 0.6),
    "N": Sound(0.09, (250, 1200, 2300), 0.4),
    "R": Sound(0.08, (310, 1060, 1380), 0.6),
    "Y": Sound(0.08, (260, 2200, 3000), 0.6),
    "F": Sound(0.11, NEUTRAL, 0.0, 0.15, 4500, 3000),
    "S": Sound(0.13, NEUTRAL, 0.0, 0.5, 5800, 1200),
    "D": Sound(0.03, (300, 1700, 2600), 0.4, 0.3, 3500, 1500),
    "G": Sound(0.03, (300, 1600, 2300), 0.4, 0.3, 2000, 700),
    "P": Sound(0.04, NEUTRAL, 0.0, 0.2, 1000, 900),
    "T": Sound(0.04, NEUTRAL, 0.0, 0.4, 4500, 1500),
    "-": Sound(0.05, NEUTRAL, 0.0),
}
"""Sounds of English by their symbols in ARPAbet. A pause before a stop has the symbol `-`."""
SYMBOLS = tuple(SOUNDS)
WORDS = {
    "down": "- D AE UH N",
    "go": "- G AO UH",
    "left": "L EH F - T",
    "no": "N AO UH",
    "off": "AO F",
    "on": "AA N",
    "right": "R AA IH - T",
    "stop": "S - T AA - P",
    "up": "AH - P",
    "yes": "Y EH S",
}
"""Sounds of the ten command words of Speech Commands."""
NAMES = tuple(WORDS)


@dataclass(frozen=True)
class Voice:
    """A person's voice.

    Attributes:
        pitch: Mean frequency of the vocal cords in Hz.
        tract: Factor of all formants, larger for a shorter vocal tract.
        pace: Factor of all durations.
        breath: Amplitude of the breath in voiced sounds.
        melody: Change of the pitch over a word, as a fraction of the pitch.
        accent: Factor of each formant of each sound, shape `[18, 3]`.
    """

    pitch: float
    tract: float
    pace: float
    breath: float
    melody: float
    accent: np.ndarray


@dataclass(frozen=True)
class RecordingDevice:
    """A device that records words.

    Attributes:
        lowest: Lowest frequency in Hz.
        highest: Highest frequency in Hz.
        tilt: Change of the loudness per octave in decibels.
        noise: Level of the noise relative to the voice in decibels.
        echo: Seconds after which an echo has fallen by 60 decibels.
        echo_energy: Energy of the echo relative to the direct sound.
    """

    lowest: float
    highest: float
    tilt: float
    noise: float
    echo: float
    echo_energy: float


# Lower and upper bounds of the settings of a device, each in the order of `RecordingDevice`.
DEVICES = {
    "phone": ((50, 6500, -1, -28, 0.1, 0.05), (150, 7800, 1, -20, 0.2, 0.2)),
    "old_phone": ((250, 3300, 0, -22, 0.1, 0.05), (350, 3900, 3, -14, 0.2, 0.2)),
    "smart_speaker": ((50, 7000, -2, -16, 0.3, 0.6), (100, 7900, 0, -9, 0.5, 1.5)),
}
"""Phones near the mouth, old phones with the bandwidth of a call, and smart speakers in a room."""


def make_voice(*key: str | int) -> Voice:
    """Generate a voice from a key. High voices tend to have a short vocal tract."""
    rng = keyed_numpy_generator("data", "speech", "voice", *key)
    height = rng.uniform()
    return Voice(
        pitch=float(90 * 2.6**height),
        tract=float(0.92 + 0.28 * height + rng.normal(0, 0.03)),
        pace=float(np.exp(rng.normal(0, 0.15))),
        breath=float(rng.uniform(0.01, 0.08)),
        melody=float(rng.uniform(-0.3, 0.2)),
        accent=np.exp(rng.normal(0, 0.09, (len(SYMBOLS), 3))),
    )


def make_device(kind: str, *key: str | int) -> RecordingDevice:
    """Generate a device of a kind from a key."""
    rng = keyed_numpy_generator("data", "speech", "device", kind, *key)
    return RecordingDevice(*map(float, rng.uniform(*DEVICES[kind])))


def speak(voice: Voice, y: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Generate a clean recording of each word in `y`.

    In each frame of a Fourier transform, pulses of the vocal cords pass the resonances of the vocal
    tract, and noise passes a band. Durations, pitch and formants vary between recordings.

    Args:
        voice: Voice of the person.
        y: Words as indices into `NAMES`, int64 `[N]`.
        rng: Random generator.

    Returns:
        Samples with a mean square of 1 while the person speaks, float32 `[N, 16000]`.
    """
    tracks = np.stack([_tracks(voice, WORDS[NAMES[word]].split(), rng) for word in y])
    formants, controls = torch.from_numpy(tracks).float().split([3, 4], dim=2)
    voiced, noisy, center, width = controls.split(1, dim=2)
    pitch = voice.pitch * np.exp(rng.normal(0, 0.05, (len(y), 1)))
    pitch = pitch * (1 + voice.melody * np.linspace(-0.5, 0.5, SAMPLES))
    frequency = torch.linspace(0, RATE / 2, FRAME // 2 + 1)
    response = voiced * _tract_response(formants, voice.tract, frequency)
    band = noisy * torch.exp(-0.5 * ((frequency - center) / width).square())
    spectrum = _stft(_pulses(pitch, rng)) * response
    breath = rng.standard_normal((len(y), SAMPLES), dtype=np.float32)
    spectrum += _stft(torch.from_numpy(breath)) * (band + voice.breath * response)
    waves = torch.istft(
        spectrum.transpose(1, 2), FRAME, HOP, window=torch.hann_window(FRAME), length=SAMPLES
    )
    mean_square = waves.square().sum(1, keepdim=True) / (SPOKEN_SHARE * SAMPLES)
    return waves / mean_square.sqrt().clamp(min=1e-9)


def record(device: RecordingDevice, waves: Tensor, rng: np.random.Generator) -> Tensor:
    """Return recordings of clean voices by a device: echo, noise, bandwidth and tilt.

    Args:
        device: Device that records.
        waves: Clean voices, float32 `[N, 16000]`.
        rng: Random generator.

    Returns:
        Samples from -1 to 1, float32 `[N, 16000]`.
    """
    count = len(waves)
    size = 2 * SAMPLES
    time = np.arange(RATE // 2) / RATE
    echo = rng.standard_normal((count, len(time)), dtype=np.float32)
    echo *= 10 ** (-3 * time / device.echo)
    echo *= (device.echo_energy / np.square(echo).sum(1, keepdims=True)) ** 0.5
    echo[:, 0] += 1.0
    frequency = np.linspace(0, RATE / 2, size // 2 + 1)
    response = 1 / np.sqrt(1 + (frequency / device.highest) ** 12)
    response /= np.sqrt(1 + (device.lowest / np.maximum(frequency, 1)) ** 4)
    response *= np.maximum(frequency / 1000, 0.05) ** (device.tilt / 6.02)
    # The noise of a room is louder at low frequencies.
    hiss = 2 / np.sqrt(1 + (frequency / 500) ** 2)
    level = 10 ** ((device.noise + rng.normal(0, 2, (count, 1))) / 20)
    noise = level * rng.standard_normal((count, size), dtype=np.float32)
    spectrum = _spectrum(waves, size) * _spectrum(echo, size)
    spectrum += _spectrum(noise, size) * torch.from_numpy(hiss).float()
    spectrum *= torch.from_numpy(response).float()
    gain = np.exp(rng.normal(0, 0.3, (count, 1)))
    recorded = torch.fft.irfft(spectrum, size)[:, :SAMPLES]
    return (torch.from_numpy(LEVEL * gain).float() * recorded).clamp(-1, 1)


def _tracks(voice: Voice, symbols: list[str], rng: np.random.Generator) -> np.ndarray:
    """Return the formants and the amplitudes of a word in each frame, shape `[FRAMES, 7]`."""
    targets = []
    for symbol in symbols:
        sound = SOUNDS[symbol]
        spread = np.exp(rng.normal(0, 0.03, 3))
        formants = np.array(sound.formants) * voice.accent[SYMBOLS.index(symbol)] * spread
        values = [*formants, sound.voice, sound.noise, sound.center, sound.width]
        seconds = sound.seconds * voice.pace * np.exp(rng.normal(0, 0.12))
        targets += [values] * max(1, round(seconds * RATE / HOP))
    spoken = np.array(targets[: FRAMES - 2 * SMOOTHING])
    begin = int(rng.integers(SMOOTHING, FRAMES - len(spoken) - SMOOTHING + 1))
    around = ((begin, FRAMES - begin - len(spoken)), (0, 0))
    padded = np.pad(spoken, around, mode="edge")
    outside = np.ones(FRAMES, dtype=bool)
    outside[begin : begin + len(spoken)] = False
    padded[outside, 3:5] = 0.0
    kernel = np.ones(SMOOTHING) / SMOOTHING
    edges = np.pad(padded, ((SMOOTHING // 2, SMOOTHING // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, mode="valid") for column in edges.T], axis=1)


def _tract_response(formants: Tensor, tract: float, frequency: Tensor) -> Tensor:
    """Return the gain of the vocal tract `[N, FRAMES, F]`, a product of resonances.

    A resonance has the gain `f0**2 / sqrt((f0**2 - f**2)**2 + (f * bandwidth)**2)`. The spectrum
    of the vocal cords, as it leaves the lips, falls by 6 decibels per octave.
    """
    square = frequency.square()
    # The product of the squared gains, of which the root is computed once.
    fall = (1 + frequency / 300).square()
    for center, bandwidth in UPPER_FORMANTS:
        fall = fall * _resonance_loss((tract * center) ** 2, bandwidth, square)
    product = fall.expand(*formants.shape[:2], -1)
    for index, bandwidth in enumerate(BANDWIDTHS):
        center_square = (tract * formants[..., index, None]).square()
        product = product * _resonance_loss(center_square, bandwidth, square)
    return product.rsqrt()


def _resonance_loss(center_square: Tensor | float, bandwidth: float, square: Tensor) -> Tensor:
    """Return the inverse of the squared gain of a resonance for squared frequencies."""
    return (1 - square / center_square).square() + square * (bandwidth**2) / center_square**2


def _pulses(pitch: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Return pulses `[N, SAMPLES]` with a mean square of 1 and harmonics up to half the rate.

    The sum of H cosines of equal amplitude is `sin((H + 0.5) * phase) / sin(0.5 * phase)`, less 1
    and divided by 2.
    """
    start = rng.uniform(0, 2 * np.pi, (len(pitch), 1))
    phase = start + 2 * np.pi * np.cumsum(pitch, axis=1) / RATE
    harmonics = np.floor(RATE / 2 / pitch.max(axis=1, keepdims=True))
    # Whole turns are removed before the precision is reduced.
    half = np.sin(0.5 * phase % (2 * np.pi), dtype=np.float32, casting="same_kind")
    other = np.sin((harmonics + 0.5) * phase % (2 * np.pi), dtype=np.float32, casting="same_kind")
    is_peak = np.abs(half) < 1e-4
    ratio = np.where(is_peak, 2 * harmonics + 1, other / np.where(is_peak, 1.0, half))
    return torch.from_numpy((ratio - 1) / np.sqrt(2 * harmonics)).float()


def _stft(waves: Tensor) -> Tensor:
    """Return the Fourier transforms of the frames, complex64 `[N, FRAMES, FRAME // 2 + 1]`."""
    window = torch.hann_window(FRAME)
    return torch.stft(waves, FRAME, HOP, window=window, return_complex=True).transpose(1, 2)


def _spectrum(waves: Tensor | np.ndarray, size: int) -> Tensor:
    return torch.fft.rfft(torch.as_tensor(waves), size)

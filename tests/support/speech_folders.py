"""Folders of WAV files in the layout of Speech Commands."""

from __future__ import annotations

import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

RATE = 16_000
SPEAKERS = ("ann", "bob", "cid", "dora")
PITCH = {"no": 300.0, "yes": 1200.0, "up": 3000.0}
"""Frequency of the tone that stands for a word, in Hz."""


def write_wav(
    path: Path,
    samples: np.ndarray | None = None,
    *,
    rate: int = RATE,
    bits: int = 16,
    channels: int = 1,
) -> Path:
    """Write samples from -1 to 1, float `[N]`, to all channels of a file. Default: 0.5 s of 440 Hz.

    Args:
        path: File to write.
        samples: Samples.
        rate: Samples per second.
        bits: Bits per sample.
        channels: Number of channels.
    """
    if samples is None:
        samples = tone(440.0, rate=rate)
    top = 2 ** (bits - 1)
    numbers = np.clip(np.rint(samples * top), -top, top - 1).astype(np.int64)
    numbers = np.repeat(numbers + (128 if bits == 8 else 0), channels)
    content = numbers.astype("<i8").view(np.uint8).reshape(-1, 8)[:, : bits // 8].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def tone(frequency: float, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """Return a tone of amplitude 0.5, float64 `[samples]`."""
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write_speech_folder(
    folder: Path,
    words: Sequence[str] = ("yes", "no", "up"),
    speakers: Mapping[str, int] | None = None,
    lists: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder in which each word is a tone, louder or quieter by speaker.

    Args:
        folder: Folder to write.
        words: Words.
        speakers: Number of recordings of each word, keyed by speaker. Default: 2 of `SPEAKERS`.
        lists: Speakers in each list, keyed by file name. Default: `cid` for validation and `dora`
            for the test. If empty, no lists are written.
        seed: Seed of the pitch and loudness of each recording.
    """
    counts = dict.fromkeys(SPEAKERS, 2) if speakers is None else speakers
    if lists is None:
        lists = {"validation_list.txt": ("cid",), "testing_list.txt": ("dora",)}
    draws = np.random.default_rng(seed)
    for word in words:
        for speaker, count in counts.items():
            for number in range(count):
                wave_of_word = tone(PITCH[word] * draws.uniform(0.9, 1.1)) * draws.uniform(0.5, 1)
                write_wav(folder / word / f"{speaker}_nohash_{number}.wav", wave_of_word)
    for name, listed in lists.items():
        lines = [
            f"{word}/{speaker}_nohash_{number}.wav\n"
            for word in words
            for speaker in listed
            for number in range(counts[speaker])
        ]
        (folder / name).write_text("".join(lines))
    write_wav(folder / "_background_noise_" / "white_noise.wav", draws.normal(0, 0.1, 3 * RATE))
    (folder / "README.md").write_text("A folder of recordings.\n")
    return folder

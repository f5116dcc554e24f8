"""Keyword spotting: recordings of words in the layout of Speech Commands.

The inputs are log-mel features, which are computed when the recordings are read.
"""

from __future__ import annotations

import io
import math
import posixpath
import re
import wave
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_fl.config.data import SourceConfig, SpeechConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples
from hetero_fl.data.partition.groups import largest_groups
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import (
    EMBEDDED,
    check_folder,
    contains_file,
    download_archive,
    read_lines,
)
from hetero_fl.data.sources.npz_files import read_columns
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError, check_names, one_line, suggest_similar
from hetero_fl.utils.ordering import natural_order

URL = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
MD5 = "6b74f3901214cb2c2934e98196829835"
FOLDER = "speech_commands_v0.02"
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
"""File with the recordings of each split that is not used for training."""
FEATURE_KEYS = ("rate", "seconds", "window", "step", "bands")
"""Settings of the features of a recording."""
FILE_NAME = re.compile(r"(?P<speaker>.+)_nohash_[0-9]+\.wav", re.IGNORECASE)


@register_source(
    "speech",
    keys=("path", "speech"),
    default_path=EMBEDDED / "speech.npz",
    folder_files=("*/*_nohash_*.wav",),
)
def speech(config: SourceConfig, _root: Path, labeled: bool = True) -> Dataset:
    """Read a folder of recordings (see `read_speech_folder`), or features from a `.npz` file.

    The inputs of a `.npz` file (see `read_columns`) are log-mel features, and its groups are in the
    array `device`. The simulated file has ten words, spoken by nine persons with devices of three
    kinds for training, and by other persons for validation and test.
    """
    path = Path(str(config.path)).expanduser()
    settings = config.speech or SpeechConfig()
    if path.suffix.lower() != ".npz":
        return read_speech_folder(path, settings)
    return read_columns(path, "speech", group="device", labeled=labeled)


@register_source("speech_public", keys=("speech",))
def speech_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read the simulated recordings of nine other persons, for use as a proxy set.

    The main data set may be a folder of recordings, from which the same features are computed.
    """
    settings = config.speech or SpeechConfig()
    for key in FEATURE_KEYS:
        default = SpeechConfig.model_fields[key].default
        if getattr(settings, key) != default:
            raise UserError(
                f"name: speech_public has features with speech.{key}={default:g}, got "
                f"{getattr(settings, key):g}; remove speech.{key}, or set name=speech and path to "
                "a folder of public recordings"
            )
    dataset = read_columns(EMBEDDED / "speech_public.npz", "speech_public")
    dataset.simulated = True
    return dataset


@register_source("speech_commands", keys=("speech",))
def speech_commands(config: SourceConfig, root: Path) -> Dataset:
    """Download Speech Commands v0.02 (Warden, arXiv:1804.03209), whose groups are the speakers.

    The archive of 2.4 GB contains 105,829 recordings of 35 words by 2,618 speakers, licensed under
    CC BY 4.0.
    """
    advice = "set data.name=speech and data.path to a local folder"
    folder = download_archive("speech_commands", URL, MD5, root / FOLDER, advice=advice)
    dataset = read_speech_folder(folder, config.speech or SpeechConfig())
    dataset.name = dataset.source = "speech_commands"
    dataset.about = f"{dataset.about}, Speech Commands v0.02 (Warden, 2018), CC BY 4.0"
    return dataset


@dataclass(frozen=True)
class Recording:
    """A recording in a folder.

    Attributes:
        file: The file.
        word: Name of the folder of the file.
        speaker: Speaker in the name of the file.
    """

    file: Path
    word: str
    speaker: str

    @property
    def entry(self) -> str:
        """Name of the recording in the lists of validation and test recordings."""
        return f"{self.word}/{self.file.name}"


def read_features(files: Sequence[Path], settings: SpeechConfig) -> Tensor:
    """Read WAV files and compute their log-mel features, some files at a time.

    Args:
        files: Files to read, at least one.
        settings: Speech settings.

    Returns:
        Features, float32 `[N, T, bands]` (see `log_mel`).

    Raises:
        UserError: If a file is malformed, too long or has another rate.
    """
    samples = round(settings.seconds * settings.rate)
    features = []
    for begin in range(0, len(files), BATCH):
        part = files[begin : begin + BATCH]
        waves = [read_wav(file, settings.rate, samples) for file in part]
        padded = [F.pad(wave, (0, samples - len(wave))) for wave in waves]
        features.append(log_mel(torch.stack(padded), settings))
    return torch.cat(features)


def read_speech_folder(path: Path, settings: SpeechConfig) -> Dataset:
    """Read a folder in the layout of Speech Commands.

    The folder contains a folder for each word with the files `SPEAKER_nohash_NUMBER.wav`. Folders
    whose names start with `_` or a dot, such as `_background_noise_`, are not words. The recordings
    in `validation_list.txt` and `testing_list.txt` (`WORD/FILE` in each line) are the global
    validation and test sets, and all others are training recordings. If neither file exists, all
    recordings are training recordings.

    Args:
        path: Folder to read.
        settings: Speech settings.

    Returns:
        A data set whose groups are the speakers of the training recordings.

    Raises:
        UserError: If a folder, a list or a file is missing or malformed.
    """
    check_folder(path)
    found = _list_words(path)
    words = found if settings.words is None else settings.words
    check_names(words, found, f"speech.words: {path} has no folder")
    recordings = [each for word in words for each in _list_recordings(path / word)]
    split_of = _read_lists(path, set(found) - set(words), recordings)
    splits: dict[str, list[Recording]] = {"train": [], "validation": [], "test": []}
    for each in recordings:
        splits[split_of.get(each.entry, "train")].append(each)
    splits["train"] = _select_speakers(splits["train"], settings.speakers, path)
    speakers = {each.speaker for each in splits["train"]}
    count = sum(map(len, splits.values()))
    about = f"{count:,} recordings of {path.name}, {len(speakers):,} speakers for training"
    parts = {name: _read(found, words, settings) for name, found in splits.items() if found}
    train = parts["train"]
    train.group, train.group_names = index_names(each.speaker for each in splits["train"])
    return Dataset(
        "speech",
        Task("multiclass", len(words), words),
        train,
        parts.get("validation"),
        parts.get("test"),
        about=about,
        columns=tuple(f"mel_{band + 1}" for band in range(settings.bands)),
    )


def _list_words(path: Path) -> tuple[str, ...]:
    """Return the names of all folders of words in natural order."""
    found = natural_order(
        folder.name
        for folder in path.iterdir()
        if folder.is_dir() and not folder.name.startswith(("_", "."))
    )
    if len(found) < 2:
        raise UserError(
            f"path: {path}: expected a folder for each of at least two words, got "
            f"{', '.join(found) or 'none'}"
        )
    return tuple(found)


def _list_recordings(folder: Path) -> list[Recording]:
    """Return the recordings of a word in natural order."""
    recordings = []
    for name in natural_order(f.name for f in folder.iterdir() if not f.name.startswith(".")):
        file = folder / name
        if file.suffix.lower() != ".wav" or not file.is_file():
            raise UserError(f"path: {file}: expected only .wav files; convert or move it")
        match = FILE_NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"path: {file}: the name has no speaker; rename it to SPEAKER_nohash_NUMBER.wav"
            )
        recordings.append(Recording(file, folder.name, match["speaker"]))
    if not recordings:
        raise UserError(f"path: {folder}: the folder of this word has no .wav files")
    return recordings


def _read_lists(
    path: Path, other_words: Set[str], recordings: Sequence[Recording]
) -> dict[str, str]:
    """Return the split of each recording that a list contains, keyed by entry.

    Args:
        path: Folder with the lists.
        other_words: Words that are not selected, whose entries are skipped.
        recordings: Recordings of the selected words.
    """
    missing = [name for name in LISTS.values() if not (path / name).is_file()]
    if len(missing) == len(LISTS):
        return {}
    if missing:
        present = next(name for name in LISTS.values() if name not in missing)
        raise UserError(
            f"path: {path}: {missing[0]} not found, but {present} exists; add the list, which may "
            f"be empty, or remove {present}"
        )
    known = {each.entry for each in recordings}
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        for number, line in read_lines(path / name):
            # Programs such as `find` write `./WORD/FILE`.
            entry = posixpath.normpath(line.strip())
            where = f"path: {path / name}: line {number}"
            if split_of.get(entry, split) != split:
                raise UserError(f"{where}: '{entry}' is also in {LISTS['validation']}")
            if entry.partition("/")[0] in other_words and contains_file(path, entry):
                continue
            if entry not in known:
                hint = suggest_similar(entry, known) or "; entries are WORD/FILE"
                raise UserError(f"{where}: '{one_line(entry, 80)}' not found{hint}")
            split_of[entry] = split
    return split_of


def _select_speakers(
    recordings: Sequence[Recording], count: int | None, path: Path
) -> list[Recording]:
    """Return the recordings of the speakers with the most recordings."""
    if not recordings:
        raise UserError(f"path: {path}: all recordings are in the lists, none is left for training")
    totals = Counter(each.speaker for each in recordings)
    what = f"speakers with training recordings in {path}"
    kept = largest_groups(totals, count, "speech.speakers", what)
    return [each for each in recordings if each.speaker in kept]


def _read(
    recordings: Sequence[Recording], words: Sequence[str], settings: SpeechConfig
) -> Examples:
    y = torch.tensor([words.index(each.word) for each in recordings])
    return Examples(read_features([each.file for each in recordings], settings), y)


FLOOR = 1e-6
"""Energy that is added before the logarithm, so that silence is finite."""
BREAK_HZ = 700.0
"""Frequency at which the mel scale changes from linear to logarithmic."""
BATCH = 256
"""Number of recordings that are transformed at a time. Does not affect the features."""


def log_mel(waves: Tensor, config: SpeechConfig) -> Tensor:
    """Compute the log-mel features of recordings.

    A feature is `log(FLOOR + sum_f filter[b, f] * |STFT(wave)[t, f]|**2)` for time t and band b,
    with a Hann window. Each spectrum is divided by the sum of the window, which makes the features
    of windows of different lengths comparable.

    Args:
        waves: Samples from -1 to 1, float32 `[N, samples]`.
        config: Speech settings.

    Returns:
        Features, float32 `[N, T, bands]` with `T = 1 + (samples - window) // step`.

    Raises:
        UserError: If there are too many bands for the window.

    Example:
        >>> import torch
        >>> from hetero_fl.config.data import SpeechConfig
        >>> from hetero_fl.data.sources.speech import log_mel
        >>> log_mel(torch.zeros(2, 16000), SpeechConfig()).shape
        torch.Size([2, 49, 40])
    """
    window_size = round(config.window * config.rate)
    step = max(1, round(config.step * config.rate))
    # The smallest power of two that is not below the size of the window.
    transform_size = 1 << (window_size - 1).bit_length()
    filters = mel_filters(config.rate, transform_size, config.bands)
    if not bool((filters.sum(1) > 0).all()):
        raise UserError(
            f"speech.bands: {config.bands} bands are too many for a window of {config.window:g} s "
            f"at {config.rate} Hz; choose fewer bands or a longer window"
        )
    # In double precision, so that all processors find the same float32 features and content hash.
    window = torch.hann_window(window_size, dtype=torch.float64)
    # The windows are cut here, because `torch.stft` would pad them on both sides.
    frames = waves.unfold(1, window_size, step) * (window / window.sum())
    power = torch.fft.rfft(frames, transform_size).abs().square()
    return (power @ filters.T + FLOOR).log().float()


def mel_filters(rate: int, transform_size: int, bands: int) -> Tensor:
    """Return triangular filters whose corners are equally spaced on the mel scale.

    The mel scale is `2595 * log10(1 + f / 700)`, as in HTK.

    Args:
        rate: Samples per second.
        transform_size: Number of samples of the Fourier transform.
        bands: Number of filters, which cover the frequencies from 0 to half the rate.

    Returns:
        Filters with a maximum of at most 1, float64 `[bands, transform_size // 2 + 1]`.
    """
    highest = 2595 * math.log10(1 + rate / 2 / BREAK_HZ)
    mel = torch.linspace(0, highest, bands + 2, dtype=torch.float64)
    corners = BREAK_HZ * (10 ** (mel / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, transform_size // 2 + 1, dtype=torch.float64)
    rising = (frequency - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequency) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


PCM = b"\x01\x00"
EXTENSIBLE = b"\xfe\xff"
"""Format of a header that is followed by a sub-format."""
PCM_SUBFORMAT = PCM + bytes.fromhex("00000000 1000 8000 00aa00389b71")


def read_wav(path: Path, rate: int, max_samples: int | None = None) -> Tensor:
    """Read a WAV file with 8, 16, 24 or 32 bits per sample.

    Args:
        path: File to read.
        rate: Samples per second, which the file must have.
        max_samples: Maximum number of samples per channel. If None, there is no maximum.

    Returns:
        Samples from -1 to 1, the mean of all channels, float32 `[samples]`.

    Raises:
        UserError: If the file is not a complete WAV file of PCM samples, has no samples or too
            many, or has another rate.
    """
    where = f"path: {path}"
    try:
        content = path.read_bytes()
        with wave.open(io.BytesIO(_simplify_header(content))) as file:
            width = file.getsampwidth()
            channels = file.getnchannels()
            found_rate = file.getframerate()
            count = file.getnframes()
            if found_rate != rate:
                raise UserError(
                    f"{where}: expected {rate} samples per second, got {found_rate}; convert the "
                    "file, or set speech.rate to the rate of all files"
                )
            if width > 4:
                raise UserError(f"{where}: expected at most 32 bits per sample, got {8 * width}")
            samples = file.readframes(count)
    # The module raises RuntimeError for a chunk that ends before its content.
    except (wave.Error, EOFError, OSError, RuntimeError) as error:
        reason = one_line(error, 200) or "the header is incomplete"
        raise UserError(
            f"{where}: not a readable WAV file ({reason}); save it as PCM with 16 bits"
        ) from error
    sample_bytes = channels * width
    if len(samples) != count * sample_bytes:
        raise UserError(
            f"{where}: the file is truncated, expected {count} samples, got "
            f"{len(samples) // sample_bytes}"
        )
    if not count:
        raise UserError(f"{where}: the file has no samples")
    if max_samples is not None and count > max_samples:
        raise UserError(
            f"{where}: expected at most {max_samples / rate:g} s, got {count / rate:.3g} s; set "
            "speech.seconds to the length of the longest recording"
        )
    values = _to_floats(samples, width).reshape(count, channels).mean(axis=1)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _simplify_header(content: bytes) -> bytes:
    """Replace an extensible header of PCM samples, which `wave` reads from Python 3.12 on."""
    start = content.find(b"fmt ") + 8
    if content.startswith(EXTENSIBLE, start) and content.startswith(PCM_SUBFORMAT, start + 24):
        return content[:start] + PCM + content[start + 2 :]
    return content


def _to_floats(content: bytes, width: int) -> np.ndarray:
    """Convert little-endian PCM samples of 1 to 4 bytes to floats from -1 to 1."""
    if width == 1:
        # Samples of 8 bits have no sign.
        return (np.frombuffer(content, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        # The bytes become the upper bytes of 32 bits.
        wide = np.zeros((len(content) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(content, f"<i{width}") / 2.0 ** (8 * width - 1)

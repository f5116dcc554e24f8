"""Recordings of words: folders in the layout of Speech Commands, downloads and simulated voices."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.config.data import DataConfig, SourceConfig, SpeechConfig
from hetero_fl.data import Dataset, federate, load_source
from hetero_fl.data.external import inherit_keys
from hetero_fl.data.sources import speech
from hetero_fl.data.sources.speech import FLOOR, log_mel, mel_filters, read_features, read_wav
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.support.cases import each_case
from tests.support.federated_data import PLAIN_CLIENT, read_source
from tests.support.file_server import publish
from tests.support.mistakes import check_broken_folders, check_refused
from tests.support.speech_folders import (
    RATE,
    tone,
    write_speech_folder,
    write_wav,
)


def load(
    path: Path | None = None, name: str = "speech", root: Path | None = None, **keys: Any
) -> Dataset:
    return read_source(name, path, root, speech=keys or None)


def band_of(frequency: float) -> float:
    """Return the index of the band with this center, of 40 bands up to 8 kHz."""
    mel = 2595 * math.log10(1 + frequency / 700)
    return mel / (2595 * math.log10(1 + 8000 / 700)) * 41 - 1


def test_tone_raises_the_energy_of_its_band_only() -> None:
    waves = torch.from_numpy(np.stack([tone(1000.0, 1.0), 0.5 * tone(1000.0, 1.0)])).float()

    features = log_mel(waves, SpeechConfig())

    center = round(band_of(1000.0))
    assert int(features[0, 10].argmax()) == center
    assert (features[0, 10, center] - features[0, 10, center + 10]) > 8
    # Half the amplitude is a quarter of the energy.
    assert (features[0] - features[1])[10, center] == pytest.approx(math.log(4), abs=1e-3)
    silence = log_mel(torch.zeros(1, RATE), SpeechConfig())
    assert torch.allclose(silence, torch.full_like(silence, math.log(FLOOR)))


def test_log_mel_matches_a_loop_over_windows() -> None:
    config = SpeechConfig(rate=8000, window=0.025, step=0.01, bands=12)
    wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    filters = mel_filters(8000, 256, 12).double().numpy()
    window = np.hanning(201)[:-1]
    rows = []
    for begin in range(0, 8000 - 200 + 1, 80):
        frame = wave[0, begin : begin + 200].double().numpy() * window / window.sum()
        rows.append(np.log(filters @ np.abs(np.fft.rfft(frame, 256)) ** 2 + FLOOR))

    features = log_mel(wave, config)

    assert features.shape == (1, 98, 12)
    assert np.allclose(features[0].numpy(), np.stack(rows), atol=1e-4)


def test_mel_filters_are_triangles_of_equal_mel_width() -> None:
    filters = mel_filters(16_000, 4096, 10)
    peaks = filters.argmax(1) * 16_000 / 4096
    mel = 2595 * torch.log10(1 + peaks / 700)
    assert torch.allclose(mel.diff(), torch.full((9,), 2840.0 / 11), rtol=0.02)
    # Neighboring triangles add up to 1 between the first and the last peak.
    inside = filters[:, int(filters[0].argmax()) + 1 : int(filters[-1].argmax())].sum(0)
    assert torch.allclose(inside, torch.ones_like(inside), atol=1e-5)


@each_case(("bits", "channels"), ((8, 1), (16, 2), (24, 1), (24, 2), (32, 1)))
def test_wav_of_any_width_is_read_as_mono_floats(bits: int, channels: int, tmp_path: Path) -> None:
    samples = tone(440.0)
    path = write_wav(tmp_path / "a.wav", samples, bits=bits, channels=channels)

    found = read_wav(path, RATE)

    assert found.dtype == torch.float32 and found.shape == (8000,)
    assert np.allclose(found.numpy(), samples, atol=2.0 ** (1 - min(bits, 20)))


@each_case("bits", (16, 24, 32))
def test_extensible_header_of_pcm_is_read(bits: int, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", bits=bits)
    expected = read_wav(path, RATE)
    plain = path.read_bytes()
    # The sub-format is that of PCM (KSDATAFORMAT_SUBTYPE_PCM).
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    extension = struct.pack("<HHI", 22, bits, 4) + guid
    header = b"\xfe\xff" + plain[22:36] + extension
    chunks = b"WAVEfmt " + struct.pack("<I", len(header)) + header + plain[36:]
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)

    assert torch.equal(read_wav(path, RATE), expected)
    path.write_bytes(path.read_bytes().replace(guid, b"\x03" + guid[1:]))
    check_refused(r"not a readable WAV file \(unknown", read_wav, path, RATE)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.array([[16384, 0], [0, -16384]], "<i2").tobytes())

    assert read_wav(tmp_path / "a.wav", RATE).tolist() == [0.25, -0.25]


def test_entries_of_lists_are_normalized(tmp_path: Path) -> None:
    words = {"words": ("yes", "no")}
    write_speech_folder(tmp_path)
    plain = [load(tmp_path, **keys) for keys in ({}, words)]
    for name in ("validation_list.txt", LIST):
        # The form of `find .`.
        entries = (tmp_path / name).read_text().split()
        (tmp_path / name).write_text("".join(f"./{entry}\n" for entry in entries))

    for keys, expected in zip(({}, words), plain, strict=True):
        found = load(tmp_path, **keys)
        assert found.train.group_names == ("ann", "bob")
        for part, other in ((found.train, expected.train), (found.test, expected.test)):
            assert part is not None and other is not None and torch.equal(part.x, other.x)
    append(tmp_path / LIST, "up/../no/bob_nohash_0.wav")
    resolved = load(tmp_path, **words)
    assert resolved.test is not None and len(resolved.test) == 5 and len(resolved.train) == 7
    for name in ("validation_list.txt", LIST):
        (tmp_path / name).unlink()
    without = load(tmp_path)
    assert without.validation is None and without.test is None and len(without.train) == 24


def test_natural_clients_are_the_speakers(tmp_path: Path) -> None:
    counts = {"ann": 8, "bob": 8, "dora": 2}
    lists = {"validation_list.txt": (), "testing_list.txt": ("dora",)}
    write_speech_folder(tmp_path, speakers=counts, lists=lists)
    config = DataConfig(name="speech", partition={"kind": "natural"}, validation=0.1)

    data = federate(load(tmp_path), config, {"ann": PLAIN_CLIENT, "bob": PLAIN_CLIENT}, 0)

    for speaker in ("ann", "bob"):
        rows = torch.cat(
            [
                torch.as_tensor(data.columns(speaker, part, data.preprocess(speaker))["x"])
                for part in ("train", "validation", "test")
            ]
        )
        files = sorted(tmp_path.glob(f"*/{speaker}_nohash_*.wav"))
        own = read_features(files, SpeechConfig()).transpose(1, 2)
        # Each row of the client is a recording of the speaker, and used once.
        is_equal = (rows[:, None] - own).abs().amax((2, 3)) < 1e-5
        assert is_equal.any(1).all() and is_equal.sum() == len(rows) > 16


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")


FIRST = "no/ann_nohash_0.wav"
LIST = "testing_list.txt"
BROKEN: list[tuple[str, Callable[[Path], object], dict[str, Any], str]] = [
    (
        "truncated",
        lambda d: rewrite(d / FIRST, lambda b: b[:-1001]),
        {},
        f"path: DIR/{FIRST}: the file is truncated, expected 8000 samples, got 7499",
    ),
    (
        "truncated header",
        lambda d: rewrite(d / FIRST, lambda b: b[:30]),
        {},
        f"path: DIR/{FIRST}: not a readable WAV file (",
    ),
    (
        "not a WAV file",
        lambda d: rewrite(d / FIRST, lambda b: b"ID3\x04 an MP3 file"),
        {},
        f"path: DIR/{FIRST}: not a readable WAV file (file does not start with RIFF id); save it",
    ),
    (
        "floating point",
        lambda d: rewrite(d / FIRST, lambda b: b[:20] + b"\x03" + b[21:]),
        {},
        f"path: DIR/{FIRST}: not a readable WAV file (unknown format: 3)",
    ),
    (
        "empty",
        lambda d: write_wav(d / FIRST, np.zeros(0)),
        {},
        f"path: DIR/{FIRST}: the file has no samples",
    ),
    (
        "rate",
        lambda d: write_wav(d / FIRST, rate=44_100),
        {},
        f"path: DIR/{FIRST}: expected 16000 samples per second, got 44100; convert the file, or",
    ),
    (
        "too long",
        lambda d: write_wav(d / FIRST, np.zeros(24_000)),
        {},
        f"path: DIR/{FIRST}: expected at most 1 s, got 1.5 s; set speech.seconds to the length",
    ),
    (
        "other file",
        lambda d: (d / "no" / "take1.mp3").write_bytes(b"ID3"),
        {},
        "path: DIR/no/take1.mp3: expected only .wav files; convert or move it",
    ),
    (
        "no speaker",
        lambda d: write_wav(d / "no" / "take1.wav"),
        {},
        "path: DIR/no/take1.wav: the name has no speaker; rename it to SPEAKER_nohash_NUMBER.wav",
    ),
    (
        "empty word",
        lambda d: (d / "stop").mkdir(),
        {},
        "path: DIR/stop: the folder of this word has no .wav files",
    ),
    (
        "missing list",
        lambda d: (d / "validation_list.txt").unlink(),
        {},
        "path: DIR: validation_list.txt not found, but testing_list.txt exists; add the list",
    ),
    (
        "missing entry",
        lambda d: append(d / LIST, "no/zoe_nohash_0.wav"),
        {},
        "path: DIR/testing_list.txt: line 7: 'no/zoe_nohash_0.wav' not found",
    ),
    (
        "entry of another folder",
        lambda d: (write_wav(d.parent / "secret.wav"), append(d / LIST, "../secret.wav")),
        {"words": ("yes", "no")},
        "path: DIR/testing_list.txt: line 7: '../secret.wav' not found; entries are WORD/FILE",
    ),
    (
        "absolute entry",
        lambda d: append(d / LIST, str(d / FIRST)),
        {"words": ("yes", "no")},
        "path: DIR/testing_list.txt: line 7: '/",
    ),
    (
        "missing entry of another word",
        lambda d: append(d / LIST, "up/zoe_nohash_0.wav"),
        {"words": ("yes", "no")},
        "path: DIR/testing_list.txt: line 7: 'up/zoe_nohash_0.wav' not found",
    ),
    (
        "long entry",
        lambda d: append(d / LIST, "up/" + "a" * 5000),
        {"words": ("yes", "no")},
        f"path: DIR/testing_list.txt: line 7: 'up/{'a' * 76}…' not found; entries are WORD/FILE",
    ),
    (
        "length",
        lambda d: rewrite(d / FIRST, lambda b: b[:40] + b"\xff" * 4 + b[44:]),
        {},
        f"path: DIR/{FIRST}: the file is truncated, expected 2147483647 samples, got 8000",
    ),
    (
        "long truncated file",
        lambda d: rewrite(d / FIRST, lambda b: b[:40] + b"\0\0\xff\x7f" + b[44:]),
        {},
        f"path: DIR/{FIRST}: the file is truncated, expected 1073709056 samples, got 8000",
    ),
    (
        "both lists",
        lambda d: append(d / LIST, "no/cid_nohash_0.wav"),
        {},
        "line 7: 'no/cid_nohash_0.wav' is also in validation_list.txt",
    ),
    (
        "list in another encoding",
        lambda d: rewrite(d / LIST, lambda b: b + b"no/zo\xeb.wav"),
        {},
        "testing_list.txt: line 7: not encoded in UTF-8",
    ),
    (
        "unknown word",
        lambda d: None,
        {"words": ("yess", "no")},
        "data.speech.words: DIR has no folder 'yess'; did you mean 'yes'?",
    ),
    (
        "no words",
        lambda d: (shutil.rmtree(d), write_wav(d / "ann_nohash_0.wav")),
        {},
        "expected a folder for each of at least two words, got no",
    ),
    (
        "no training",
        lambda d: (
            shutil.rmtree(d),
            write_speech_folder(
                d,
                speakers={"cid": 1, "dora": 1},
                lists={"validation_list.txt": ("cid",), "testing_list.txt": ("dora",)},
            ),
        ),
        {},
        "all recordings are in the lists, none is left",
    ),
    (
        "speakers",
        lambda d: None,
        {"speakers": 3},
        "data.speech.speakers: must be <= 2, the number of speakers with training recordings in "
        "DIR, got 3",
    ),
    (
        "bands",
        lambda d: None,
        {"bands": 128, "window": 0.01},
        "data.speech.bands: 128 bands are too many for a window of 0.01 s at 16000 Hz; choose",
    ),
]


def test_malformed_folder_raises_one_line(subtests: pytest.Subtests) -> None:
    check_broken_folders(subtests, BROKEN, write_speech_folder, load)


def test_interrupted_extraction_leaves_no_folder(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = write_speech_folder(tmp_path / "words")
    archive = publish(words, "speech_commands_v0.02.tar.gz", server, speech, monkeypatch)

    def full(_archive: str, folder: str) -> None:
        (Path(folder) / "yes").mkdir()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.utils.extract_archive", full)
        check_refused("No space left", load, name="speech_commands", root=tmp_path / "root")
    assert [e.name for e in (tmp_path / "root").iterdir()] == [archive.name]
    archive.unlink()

    # The archive that was downloaded is extracted.
    assert len(load(name="speech_commands", root=tmp_path / "root").train) == 12


def test_public_recordings_have_the_default_features(tmp_path: Path) -> None:
    # Own recordings may have other words.
    main = SourceConfig(name="speech", path="words", speech={"words": ["yes", "no"]})

    public = load_source(inherit_keys(SourceConfig(name="speech_public"), main), Path())

    assert len(public.train) == 360 and public.train.x.shape[1:] == (49, 40)
    for key, value in (("bands", 20), ("seconds", 0.5)):
        source = {
            "name": "speech",
            "path": str(write_speech_folder(tmp_path / key)),
            "speech": {key: value},
            "partition": {"min_size": 1},
            "proxy": {"source": {"name": "speech_public"}},
        }
        with pytest.raises(
            UserError,
            match=rf"^data\.proxy\.source\.name: speech_public has features with speech\.{key}=\d+,"
            rf" got {value}; remove speech\.{key}, or set name=speech and path to",
        ):
            prepare({"data": source, "clients": {"count": 2}, "algorithm": {"name": "fedmd"}})

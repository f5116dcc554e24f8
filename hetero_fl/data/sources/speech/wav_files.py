"""WAV files of PCM samples, read with the standard library."""

from __future__ import annotations

import io
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.utils.errors import UserError, one_line

NO_LENGTH = 0xFFFFFFFF
"""Number of bytes in the header of a file that was written before its length was known."""
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
        if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
            raise UserError(f"{where}: not a WAV file; convert it to WAV")
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
    if count == NO_LENGTH // sample_bytes:
        raise UserError(f"{where}: the header has no length, as in a stream; save the file again")
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

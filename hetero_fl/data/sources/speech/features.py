"""Log-mel features of sound: a spectrogram, mel filters and a logarithm."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hetero_fl.config.data import SpeechConfig
from hetero_fl.utils.errors import UserError

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
        >>> from hetero_fl.data.sources.speech.features import log_mel
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
    window = torch.hann_window(window_size)
    features = []
    for part in waves.split(BATCH):
        # The windows are cut here, because `torch.stft` would pad them on both sides.
        frames = part.unfold(1, window_size, step) * (window / window.sum())
        power = torch.fft.rfft(frames, transform_size).abs().square()
        features.append((power @ filters.T + FLOOR).log())
    return torch.cat(features) if features else waves.new_zeros(0, 0, config.bands)


def band_names(config: SpeechConfig) -> tuple[str, ...]:
    """Return the names of the mel bands, from low to high frequencies."""
    return tuple(f"mel_{band + 1}" for band in range(config.bands))


@lru_cache(maxsize=16)
def mel_filters(rate: int, transform_size: int, bands: int) -> Tensor:
    """Return triangular filters whose corners are equally spaced on the mel scale.

    The mel scale is `2595 * log10(1 + f / 700)`, as in HTK.

    Args:
        rate: Samples per second.
        transform_size: Number of samples of the Fourier transform.
        bands: Number of filters, which cover the frequencies from 0 to half the rate.

    Returns:
        Filters with a maximum of at most 1, float32 `[bands, transform_size // 2 + 1]`.
    """
    highest = 2595 * math.log10(1 + rate / 2 / BREAK_HZ)
    mel = torch.linspace(0, highest, bands + 2, dtype=torch.float64)
    corners = BREAK_HZ * (10 ** (mel / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, transform_size // 2 + 1, dtype=torch.float64)
    rising = (frequency - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequency) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0).float()

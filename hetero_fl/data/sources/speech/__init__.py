"""Recordings of words as log-mel features: folders, a download and simulated features."""

from hetero_fl.data.sources.speech.features import log_mel
from hetero_fl.data.sources.speech.source import read_features, read_speech_folder
from hetero_fl.data.sources.speech.wav_files import read_wav

__all__ = ["log_mel", "read_features", "read_speech_folder", "read_wav"]

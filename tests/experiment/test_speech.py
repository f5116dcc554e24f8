"""Federations of speakers: a folder of recordings, a public folder, predictions, evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

import hetero_fl
from hetero_fl.config.data import SpeechConfig
from hetero_fl.data.sources.speech import read_features
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError
from tests.support.speech_folders import write_speech_folder

SPEECH = {"words": ["yes", "no"], "bands": 16, "step": 0.05}
MODELS = {
    "ann": "cnn1d",
    "bob": {"name": "gru", "hidden": 16, "pool": "mean"},
    "cid": {"name": "transformer", "width": 16, "depth": 1},
}


def federation(folder: Path, public: Path) -> dict[str, object]:
    return {
        "rounds": 2,
        "data": {
            "name": "speech",
            "path": str(folder),
            "speech": {**SPEECH, "speakers": 3},
            "partition": {"kind": "natural", "min_size": 8},
            "validation": 0.1,
            "proxy": {"size": 12, "source": {"name": "speech", "path": str(public)}},
        },
        "clients": {
            "defaults": {"preprocess": {"normalize": "own"}},
            "groups": [{"name": name, "model": model} for name, model in MODELS.items()],
        },
        "algorithm": {"name": "fedmd"},
        "output": {"plots": False, "report": False},
    }


def test_speakers_train_three_kinds_of_models(tmp_path: Path) -> None:
    counts = {"ann": 10, "bob": 10, "cid": 10, "dora": 4}
    lists = {"validation_list.txt": (), "testing_list.txt": ("dora",)}
    folder = write_speech_folder(tmp_path / "words", speakers=counts, lists=lists)
    public = write_speech_folder(tmp_path / "public", speakers={"eve": 8}, lists={})

    run = hetero_fl.run(federation(folder, public), out=tmp_path / "run", quiet=True)

    data = run.summary["data"]
    assert (data["n_test"], data["n_proxy"], data["simulated"]) == (8, 12, False)
    assert [client["id"] for client in run.summary["clients"]] == list(MODELS)
    x = read_features([folder / "yes" / "dora_nohash_0.wav"], SpeechConfig(**SPEECH))
    assert run.predict("bob", x).shape == (1, 2)
    # Another folder is read with the settings of the run, except the number of speakers.
    other = write_speech_folder(tmp_path / "other", speakers={"zoe": 3}, lists={}, seed=1)
    scores = hetero_fl.evaluate(run, str(other))
    assert set(scores) == set(MODELS) and scores["ann"]["accuracy"] is not None


def test_public_folder_without_a_word_of_the_run_is_refused(tmp_path: Path) -> None:
    counts = {"ann": 10, "bob": 10, "cid": 10}
    folder = write_speech_folder(tmp_path / "words", speakers=counts, lists={})
    public = write_speech_folder(
        tmp_path / "public", words=("up", "yes"), speakers={"eve": 8}, lists={}
    )

    with pytest.raises(UserError, match=r"data\.proxy\.source\.speech\.words: .*no folder 'no'"):
        prepare(federation(folder, public), [])

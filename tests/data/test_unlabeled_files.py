"""Files without labels, and names of data sets, are read as the sources define them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hetero_fl.config.data import TextConfig
from hetero_fl.data.sources.text import read_vocabulary
from hetero_fl.experiment import prepare

CLIENTS = {"count": 2, "defaults": {"model": "linear"}}


def proxy_of(name: str, source: str, path: Path) -> np.ndarray:
    data = {"name": name, "proxy": {"source": {"name": source, "path": str(path)}}}
    run = prepare({"data": data, "clients": CLIENTS, "algorithm": {"name": "fedmd"}})
    return run.federation.data.public_sets["proxy"].examples.x.numpy()  # type: ignore[no-any-return]


def test_unlabeled_npz_files_of_any_spelling_are_a_proxy_set(tmp_path: Path) -> None:
    windows = np.random.default_rng(0).normal(size=(30, 64, 6)).astype(np.float32)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for name in ("public.npz", "PUBLIC.NPZ"):
        with (tmp_path / name).open("wb") as file:
            np.savez(file, x=windows, train_images=images)
        assert np.array_equal(proxy_of("activity", "activity", tmp_path / name), windows)
        assert proxy_of("digits", "npz", tmp_path / name).shape == (30, 1, 8, 8)


def test_vocabulary_reads_all_words_of_a_text_with_tabs(tmp_path: Path) -> None:
    public = tmp_path / "public.txt"
    public.write_text("spam\tgood\tbad\n" * 2)
    for predict, words in (("class", {"good", "bad"}), ("next", {"good", "bad", "spam"})):
        vocabulary = read_vocabulary(TextConfig(public=str(public), predict=predict))
        assert set(vocabulary.words) == words

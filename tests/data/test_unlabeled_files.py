"""Files without labels, and names of data sets, are read as the sources define them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hetero_fl.config.data import SourceConfig, TextConfig
from hetero_fl.data import check_source
from hetero_fl.data.sources.text import read_vocabulary
from hetero_fl.experiment import prepare
from hetero_fl.utils.errors import UserError

CLIENTS = {"count": 2, "defaults": {"model": "linear"}}


def proxy_of(name: str, source: str, path: Path) -> np.ndarray:
    data = {"name": name, "proxy": {"source": {"name": source, "path": str(path)}}}
    run = prepare({"data": data, "clients": CLIENTS, "algorithm": {"name": "fedmd"}})
    return run.federation.data.public_sets["proxy"].examples.x.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["public.npz", "PUBLIC.NPZ"])
def test_unlabeled_windows_of_recordings_are_a_proxy_set(name: str, tmp_path: Path) -> None:
    windows = np.random.default_rng(0).normal(size=(30, 64, 6)).astype(np.float32)
    np.savez(tmp_path / "public.npz", x=windows)
    (tmp_path / "public.npz").rename(tmp_path / name)

    proxy = proxy_of("activity", "activity", tmp_path / name)

    assert np.array_equal(proxy, windows)


def test_suffix_of_a_file_may_be_in_capitals(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "public.npz", train_images=images)
    (tmp_path / "public.npz").rename(tmp_path / "X.NPZ")

    proxy = proxy_of("digits", "npz", tmp_path / "X.NPZ")

    assert proxy.shape == (30, 1, 8, 8)


@pytest.mark.parametrize(
    ("predict", "words"), [("class", {"good", "bad"}), ("next", {"good", "bad", "spam"})]
)
def test_vocabulary_reads_all_words_of_a_text_with_tabs(
    predict: str, words: set[str], tmp_path: Path
) -> None:
    public = tmp_path / "public.txt"
    public.write_text("spam\tgood\tbad\n" * 2)

    vocabulary = read_vocabulary(TextConfig(public=str(public), predict=predict))

    assert set(vocabulary.words) == words


def test_prefix_of_medmnist_is_not_the_name_of_other_sources() -> None:
    with pytest.raises(UserError, match="unknown source 'medmnist:digits'"):
        check_source(SourceConfig(name="medmnist:digits"))

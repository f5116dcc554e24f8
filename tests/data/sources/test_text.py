"""Texts as tokens: vocabulary, simulated messages, files and errors."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hetero_fl.data import Dataset, Vocabulary
from hetero_fl.data.dataset import EMPTY, FIRST, UNKNOWN
from hetero_fl.data.sources import text as phrases
from hetero_fl.utils.text import split_words
from tests.support.cases import each_case
from tests.support.federated_data import read_source
from tests.support.mistakes import check_refused


def load(name: str, path: Path | None = None, group: str | None = None, **text: object) -> Dataset:
    return read_source(name, path, group=group, text=text)


def words_of(dataset: Dataset, row: int) -> list[str]:
    assert dataset.vocabulary is not None
    names = ["", "?", *dataset.vocabulary.names]
    return [names[token] for token in dataset.train.x[row].tolist()]


def test_vocabulary_encodes_words() -> None:
    assert split_words("It's 5 o’clock, Anna-Maria: now!") == [
        "it's",
        "5",
        "o’clock",
        "anna-maria",
        "now",
        "!",
    ]
    known = Vocabulary.from_texts([["a", "b", "b"], ["c", "a", "a", "once"]], max_words=2)
    assert known.words == ("a", "b") and known.size == 4
    assert known.encode(["b a x a", "a"], 3).tolist() == [[2, UNKNOWN, 2], [EMPTY, EMPTY, 2]]
    x, y, owners = known.continuations([["a", "b", "x", "a"], ["b"]], 2)
    assert (
        x.tolist() == [[EMPTY, 2], [3, UNKNOWN]]
        and y.tolist() == [1, 0]
        and owners.tolist() == [0, 0]
    )


@each_case(
    ("text", "words"),
    (
        ("我喜歡Python 3.10!", ["我", "喜", "歡", "python", "3", ".", "10", "!"]),
        ("ラーメンを食べる", list("ラーメンを食べる")),
        ("ﾃｽﾄ𠮷野家", list("ﾃｽﾄ𠮷野家")),
        ("ดีที่สุด", ["ดี", "ที่", "สุ", "ด"]),
        ("ສະບາຍ", list("ສະບາຍ")),
        ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("한국어 텍스트, наïve-ß", ["한국어", "텍스트", "наïve-ß"]),
    ),
)
def test_characters_are_words_in_scripts_without_spaces(text: str, words: Any) -> None:
    assert split_words(text) == words


def test_combining_marks_belong_to_their_word(subtests: pytest.Subtests) -> None:
    for words in (
        "हिन्दी भाषा में",
        "বাংলা ভাষা",
        "தமிழ் மொழி",
        "తెలుగు లిపి",
        "മലയാളം ലിപി",
        "සිංහල භාෂාව",
        "العَرَبِيَّة لُغَة",
        "עִבְרִית שָׂפָה",
        "می\u200cخواهم",
        "tiếng việt café",
    ):
        for form in ("NFC", "NFD"):
            with subtests.test(words=words, form=form):
                expected = [unicodedata.normalize("NFC", word) for word in words.split()]

                assert split_words(unicodedata.normalize(form, words)) == expected


def test_dotted_capital_begins_a_word() -> None:
    assert len(split_words("İstanbul güzel")) == 2


def test_classification_of_text_without_spaces_equals_that_with_spaces(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for row in range(60):
        characters = [*rng.permutation(list("天地玄黄宇宙洪荒"))[:5], "好坏"[row % 2]]
        lines.append(("good" if row % 2 == 0 else "bad", rng.permutation(characters).tolist()))
    read = {}
    for gap in ("", " "):
        file = tmp_path / f"{len(gap)}.txt"
        file.write_text("\n".join(f"{c}\t{gap.join(t)}" for c, t in lines), encoding="utf-8")
        read[gap] = load("text", file, predict="class", tokenizer="hashing")

    assert torch.equal(read[""].train.x, read[" "].train.x)
    assert "characters are the tokens" in " ".join(read[""].notes)


def test_hashing_needs_no_corpus_and_is_stable() -> None:
    hashed = Vocabulary(buckets=50)
    assert hashed.size == 52 and hashed == Vocabulary(buckets=50)
    # the same in every process and release
    assert hashed.numbers("the owner's own word") == [42, 35, 40, 31]
    assert all(FIRST <= hashed.number(f"w{i}") < hashed.size for i in range(200))


def test_messages_are_not_split_and_phones_differ() -> None:
    dataset = load("phrases", length=5)
    train = dataset.train
    assert train.x.shape[1] == 5 and train.group is not None and train.patient is not None
    assert [words_of(dataset, row) for row in range(3)] == [
        ["", "", "", "", "where"],
        ["", "", "", "where", "is"],
        ["", "", "where", "is", "the"],
    ]
    assert len({(int(p), int(g)) for p, g in zip(train.patient, train.group, strict=True)}) == len(
        train.patient.unique()
    )
    topics = load("phrases", predict="class")
    assert (
        topics.task.names == phrases.TOPICS
        and topics.train.patient is None
        and topics.train.group is not None
    )
    assert topics.train.y is not None
    main = [
        torch.bincount(topics.train.y[topics.train.group == g], minlength=6).argmax().item()
        for g in range(12)
    ]
    assert len(set(main)) >= 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "phones").mkdir()
    for name, line in (
        ("ann", "see you at the pool SECRETANN"),
        ("bob", "see you at the bank SECRETBOB"),
    ):
        (tmp_path / "phones" / f"{name}.txt").write_text(f"{line}\n\n" * 30, encoding="utf-8")
    (tmp_path / "public.txt").write_text(
        "see you at the gym\nsee you at the pool\n" * 2, encoding="utf-8"
    )
    return tmp_path


def test_invalid_text_files_raise_one_line(folder: Path) -> None:
    (folder / "bad.txt").write_bytes(b"fine here\nnot \xff here\n")
    (folder / "mail.txt").write_text("spam\tbuy\nno class\n", encoding="utf-8")
    (folder / "none.txt").write_text("one\n", encoding="utf-8")
    (folder / "empty").mkdir()
    hashing = {"tokenizer": "hashing"}
    for path, group, text, words in (
        ("gone", None, hashing, "data.path: file or folder '.*gone' not found"),
        ("empty", None, hashing, "data.path: .*empty: the folder has no .txt files"),
        ("bad.txt", None, hashing, "data.path: .*bad.txt: line 2: not encoded in UTF-8"),
        ("none.txt", None, hashing, "data.path: .*none.txt: no line has 2 words"),
        (
            "mail.txt",
            None,
            {**hashing, "predict": "class"},
            "data.path: .*mail.txt: line 2: expected a class, a tab and a text, got 'no class'",
        ),
        ("phones", "site", hashing, "data.group: must be 'file' for texts, got 'site'"),
        ("bad.txt", "file", hashing, "data.group=file needs a folder of .txt files, got the file"),
        ("phones", None, {}, "data.text.public: missing"),
        ("phones", None, {"public": "gone.txt"}, "data.text.public: gone.txt: No such file"),
        (
            "phones",
            None,
            {"public": str(folder / "none.txt")},
            "needs at least two words that occur twice, got 0",
        ),
    ):
        check_refused(words, load, "text", folder / path, group, **text)

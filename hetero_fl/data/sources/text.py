"""Texts from files: a message a line, and the words of them as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.source import SourceConfig, TextConfig
from hetero_fl.data.base import Dataset, Examples, places
from hetero_fl.data.registry import source
from hetero_fl.data.tokens import Vocabulary, split_words
from hetero_fl.errors import UserError, beside
from hetero_fl.order import in_order
from hetero_fl.task import Task


@source("text", keys=("path", "group", "text"))
def text(config: SourceConfig, root: Path) -> Dataset:
    """The lines of a text file, or of all `.txt` files of a folder, each line a message of its own.

    `group: file` says that each file of the folder is one client's. With `text.predict: class` a line is the class, a
    tabulator, and the message. Words are numbered by the file `text.public` or by hashing, never by what clients wrote.
    """
    settings, path = config.text or TextConfig(), Path(str(config.path)).expanduser()
    if config.group not in (None, "file"):
        raise UserError(f"group: found '{config.group}'; choose file (a client for each file of the folder)")
    files = _files(path)
    if config.group and path.is_file():
        raise UserError(f"group: found file, but path: {path} is one file; give a folder of .txt files")
    vocabulary = _vocabulary(settings)
    messages: list[list[str]] = []
    classes: list[str] = []
    owners: list[str] = []
    for file in files:
        for number, line in read_lines(file, "path"):
            label, message = _parts(line, f"path: {file}: line {number}") if settings.predict == "class" else ("", line)
            words = split_words(message)
            if len(words) > (settings.predict == "next"):
                messages.append(words)
                classes.append(label)
                owners.append(file.stem)
    if not messages:
        least = "two words" if settings.predict == "next" else "a word"
        raise UserError(f"path: {path}: found no line of at least {least}")
    y, names = places(classes)
    train, whose = examples_of(messages, y.tolist(), settings, vocabulary)
    if len(train) == 0:
        raise UserError(f"text.public: {settings.public} has none of the words in {path}; take text of the same kind")
    if config.group:
        group, train.group_names = places(owners)
        train.group = group[whose]
    task = task_of(settings, vocabulary, names)
    about = f"{len(messages):,} lines of {path.name}, {vocabulary.size:,} tokens"
    return Dataset("text", task, train, about=about, vocabulary=vocabulary)


def examples_of(
    texts: Sequence[Sequence[str]], classes: Sequence[int], settings: TextConfig, vocabulary: Vocabulary
) -> tuple[Examples, Tensor]:
    """Examples of texts in words, and the number of each example's text, int64 `[N]`.

    Next words: the places of one text are never split up between sets (as rows of one patient are not).
    """
    if settings.predict == "class":
        examples = Examples(vocabulary.encode(texts, settings.length), torch.tensor(classes, dtype=torch.int64))
        return examples, torch.arange(len(texts))
    x, y, whose = vocabulary.continuations(texts, settings.length)
    return Examples(x, y, patient=whose), whose


def task_of(settings: TextConfig, vocabulary: Vocabulary, classes: tuple[str, ...]) -> Task:
    """What is learned: the next word of the vocabulary, or one of the classes."""
    names = classes if settings.predict == "class" else vocabulary.names
    return Task("multiclass", len(names), names)


def _vocabulary(settings: TextConfig) -> Vocabulary:
    if settings.tokenizer == "hashing":
        return Vocabulary(buckets=settings.vocabulary)
    if settings.public is None:
        raise UserError(
            "text.public: missing; name a file of public text for the vocabulary, or set tokenizer: hashing"
        )
    public = Path(settings.public).expanduser()
    lines = [line.rpartition("\t")[2] for _, line in read_lines(public, "text.public")]
    vocabulary = Vocabulary.of(map(split_words, lines), settings.vocabulary)
    if len(vocabulary.words) < 2:
        raise UserError(f"text.public: {public}: found {len(vocabulary.words)} words that occur twice; give more text")
    return vocabulary


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"path: {path}: no such file or folder{beside(path)}")
    found = {file.name: file for file in path.glob("*.txt")}
    if not found:
        raise UserError(f"path: {path}: found no .txt file in this folder")
    return [found[name] for name in in_order(found)]


def read_lines(path: Path, where: str) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number, from 1. Raises UserError."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{where}: {path}: line {line}: not in UTF-8; save it anew so") from error
    except OSError as error:
        raise UserError(f"{where}: {path}: {error.strerror}") from error
    return [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _parts(line: str, where: str) -> tuple[str, str]:
    label, tab, message = line.partition("\t")
    if not tab or not label.strip() or not message.strip():
        raise UserError(f"{where}: found '{line[:40]}'; want a class, a tabulator, and the text")
    return label.strip(), message

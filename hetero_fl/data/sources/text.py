"""Text sources: files with one message per line, and simulated phone messages.

Vocabularies are defined by public text or by hashing, never by the texts of clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import (
    Dataset,
    Examples,
    PatientTerm,
    Vocabulary,
    index_names,
    note_unspaced,
    split_words,
)
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED, read_lines
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import pluralize

TEXTS = PatientTerm("text", "data.text.predict=next keeps the rows of each text together")


@register_source("text", keys=("path", "group", "text"))
def text(config: SourceConfig, _root: Path) -> Dataset:
    """Load the lines of a text file, or of all `.txt` files of a folder, as messages.

    With `group: file`, each file of the folder is a group. With `text.predict: class`, each line
    consists of a class, a tab and a message.
    """
    settings = config.text or TextConfig()
    path = Path(str(config.path)).expanduser()
    if config.group not in (None, "file"):
        raise UserError(f"group: must be 'file' for texts, got '{config.group}'")
    files = _files(path)
    if config.group and path.is_file():
        raise UserError(
            f"group=file needs a folder of .txt files, got the file '{path}'; set path to a folder"
        )
    vocabulary = read_vocabulary(settings)
    # A single word has no next word.
    min_words = 2 if settings.predict == "next" else 1
    least = pluralize(min_words, "word")
    dropped = 0
    messages: list[list[str]] = []
    classes: list[str] = []
    owners: list[str] = []
    for file in files:
        for number, line in read_lines(file):
            label, message = (
                _split_label(line, f"path: {file}: line {number}")
                if settings.predict == "class"
                else ("", line)
            )
            words = split_words(message)
            if len(words) >= min_words:
                messages.append(words)
                classes.append(label)
                owners.append(file.stem)
            else:
                dropped += 1
    if not messages:
        raise UserError(f"path: {path}: no line has {least}")
    y, names = index_names(classes)
    train, text_indices = make_examples(messages, y.tolist(), settings, vocabulary)
    if len(train) == 0:
        raise UserError(
            f"text.public: {settings.public} has none of the words in {path}; choose text of the "
            "same kind"
        )
    if config.group:
        group, train.group_names = index_names(owners)
        train.group = group[text_indices]
    task = make_task(settings, vocabulary, names)
    about = f"{len(messages):,} lines of {path.name}, {vocabulary.size:,} tokens"
    notes = note_unspaced(messages)
    if dropped:
        notes = (f"{pluralize(dropped, 'line')} with fewer than {least} left out", *notes)
    return Dataset("text", task, train, about=about, notes=notes, vocabulary=vocabulary)


def make_examples(
    texts: Sequence[Sequence[str]],
    classes: Sequence[int],
    settings: TextConfig,
    vocabulary: Vocabulary,
) -> tuple[Examples, Tensor]:
    """Convert texts to examples of the task.

    For next-word prediction, each text is treated as a patient, so that the words of a text are
    never divided between splits.

    Args:
        texts: Texts as sequences of words.
        classes: Class number of each text.
        settings: Text settings.
        vocabulary: Vocabulary.

    Returns:
        Examples, and the index of the text of each example, int64 `[N]`.
    """
    if settings.predict == "class":
        examples = Examples(
            vocabulary.encode(texts, settings.length), torch.tensor(classes, dtype=torch.int64)
        )
        return examples, torch.arange(len(texts))
    x, y, text_indices = vocabulary.continuations(texts, settings.length)
    return Examples(x, y, patient=text_indices, patient_term=TEXTS), text_indices


def make_task(settings: TextConfig, vocabulary: Vocabulary, classes: tuple[str, ...]) -> Task:
    """Return the task of predicting the next word or the class of a text.

    Args:
        settings: Text settings.
        vocabulary: Vocabulary whose words are the classes of next-word prediction.
        classes: Names of the classes of texts.
    """
    names = classes if settings.predict == "class" else vocabulary.names
    return Task("multiclass", len(names), names)


def read_vocabulary(settings: TextConfig) -> Vocabulary:
    """Return the vocabulary of the public text, or the vocabulary of hash values.

    Raises:
        UserError: If no public text is configured, or it cannot be read or is too short.
    """
    if settings.tokenizer == "hashing":
        return Vocabulary(buckets=settings.vocabulary)
    if settings.public is None:
        raise UserError(
            "text.public: missing; set a file of public text for the vocabulary, or "
            "text.tokenizer=hashing"
        )
    public = Path(settings.public).expanduser()
    lines = [line for _, line in read_lines(public, "text.public")]
    if settings.predict == "class":
        # Public text may have classes, as in `_split_label`.
        lines = [line.partition("\t")[2] or line for line in lines]
    vocabulary = Vocabulary.from_texts(map(split_words, lines), settings.vocabulary)
    if len(vocabulary.words) < 2:
        raise UserError(
            f"text.public: {public}: needs at least two words that occur twice, got "
            f"{len(vocabulary.words)}; choose a longer text"
        )
    return vocabulary


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"path: file or folder '{path}' not found{suggest_file(path)}")
    files = {file.name: file for file in path.glob("*.txt")}
    if not files:
        raise UserError(f"path: {path}: the folder has no .txt files")
    return [files[name] for name in natural_order(files)]


def _split_label(line: str, where: str) -> tuple[str, str]:
    label, tab, message = line.partition("\t")
    if not tab or not label.strip() or not message.strip():
        raise UserError(f"{where}: expected a class, a tab and a text, got '{line[:40]}'")
    return label.strip(), message


PHRASES = EMBEDDED / "phrases"
"""Folder with a file of simulated messages of each phone and of each other set."""
PHONES = 12
TOPICS = ("work", "food", "sport", "travel", "health", "home")


@register_source("phrases", keys=("text",))
def phone_messages(config: SourceConfig, _root: Path) -> Dataset:
    """Read the simulated messages of twelve phones (groups), for next-word or topic prediction.

    Each phone has its own mix of topics, its own habits and three private contacts whose names do
    not occur in public text.
    """
    text = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(text)
    names = tuple(f"phone_{i + 1:02d}" for i in range(PHONES))
    phones = [_read_phrases(name) for name in names]
    messages = [message for phone in phones for message in phone]
    train, text_indices = _phrase_examples(messages, text, vocabulary)
    counts = torch.tensor([len(phone) for phone in phones])
    train.group = torch.arange(PHONES).repeat_interleave(counts)[text_indices]
    train.group_names = names
    validation, test = (
        _phrase_examples(_read_phrases(name), text, vocabulary)[0]
        for name in ("validation", "test")
    )
    return Dataset(
        "phrases",
        make_task(text, vocabulary, TOPICS),
        train,
        validation,
        test,
        simulated=True,
        about=f"{len(messages):,} messages of {PHONES} phones, {vocabulary.size:,} tokens",
        vocabulary=vocabulary,
    )


@register_source("phrases_public", keys=("text",))
def phrases_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read the simulated public messages that define the vocabulary, for use as a proxy set."""
    text = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(text)
    messages = _read_phrases("public")
    return Dataset(
        "phrases_public",
        make_task(text, vocabulary, TOPICS),
        _phrase_examples(messages, text, vocabulary)[0],
        simulated=True,
        about=f"{len(messages):,} public messages, {vocabulary.size:,} tokens",
        vocabulary=vocabulary,
    )


def _read_phrases(name: str) -> list[tuple[str, list[str]]]:
    """Return the topic and the words of each message in a file of the package."""
    path = PHRASES / f"{name}.txt"
    labeled = [_split_label(line, f"path: {path}: line {n}") for n, line in read_lines(path)]
    return [(topic, split_words(message)) for topic, message in labeled]


def _phrase_examples(
    messages: Sequence[tuple[str, Sequence[str]]], text: TextConfig, vocabulary: Vocabulary
) -> tuple[Examples, Tensor]:
    """Return examples, and the index of the message of each example (see `make_examples`)."""
    topics = [TOPICS.index(topic) for topic, _ in messages]
    return make_examples([words for _, words in messages], topics, text, vocabulary)


def _phrase_vocabulary(text: TextConfig) -> Vocabulary:
    if text.tokenizer == "hashing":
        return Vocabulary(buckets=text.vocabulary)
    return Vocabulary.from_texts((words for _, words in _read_phrases("public")), text.vocabulary)

"""Text sources: files with one message per line, and simulated phone messages.

Vocabularies are defined by public text or by hashing, never by the texts of clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from hetero_fl.config.data import SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, PatientTerm, Vocabulary
from hetero_fl.data.registry import register_source
from hetero_fl.data.sources.files import EMBEDDED, read_lines
from hetero_fl.utils.arrays import index_names
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.text import note_unspaced, pluralize, split_words

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
    found = _read_messages(files, labeled=settings.predict == "class")
    messages = [message for message in found if len(message.words) >= min_words]
    if not messages:
        raise UserError(f"path: {path}: no line has {least}")
    classes = tuple(natural_order({message.label for message in messages}))
    train = _examples(messages, classes, settings, vocabulary, grouped=config.group is not None)
    if len(train) == 0:
        raise UserError(
            f"text.public: {settings.public} has none of the words in {path}; choose text of the "
            "same kind"
        )
    notes = note_unspaced(message.words for message in messages)
    if dropped := len(found) - len(messages):
        notes = (f"{pluralize(dropped, 'line')} with fewer than {least} left out", *notes)
    return Dataset(
        "text",
        make_task(settings, vocabulary, classes),
        train,
        about=f"{len(messages):,} lines of {path.name}, {vocabulary.size:,} tokens",
        notes=notes,
        vocabulary=vocabulary,
    )


class Message(NamedTuple):
    """A line of a text file.

    Attributes:
        owner: Name of the file without its suffix.
        label: Class, or an empty string.
        words: Words of the message.
    """

    owner: str
    label: str
    words: list[str]


def _read_messages(files: Sequence[Path], *, labeled: bool) -> list[Message]:
    """Read the lines of files, which start with a class and a tab if `labeled` is set."""
    messages = []
    for file in files:
        for number, line in read_lines(file):
            label, tab, text = line.partition("\t") if labeled else ("", "", line)
            if labeled and not (tab and label.strip() and text.strip()):
                raise UserError(
                    f"path: {file}: line {number}: expected a class, a tab and a text, got "
                    f"'{line[:40]}'"
                )
            messages.append(Message(file.stem, label.strip(), split_words(text)))
    return messages


def _examples(
    messages: Sequence[Message],
    classes: tuple[str, ...],
    settings: TextConfig,
    vocabulary: Vocabulary,
    *,
    grouped: bool = False,
) -> Examples:
    """Convert messages to examples of the task, which are grouped by file if `grouped` is set.

    For next-word prediction, each message is treated as a patient, so that its words are never
    divided between splits.
    """
    texts = [message.words for message in messages]
    if settings.predict == "class":
        y = torch.tensor([classes.index(message.label) for message in messages])
        rows = torch.arange(len(messages))
        examples = Examples(vocabulary.encode(texts, settings.length), y)
    else:
        x, y, rows = vocabulary.continuations(texts, settings.length)
        examples = Examples(x, y, patient=rows, patient_term=TEXTS)
    if grouped:
        group, examples.group_names = index_names(message.owner for message in messages)
        examples.group = group[rows]
    return examples


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
        # Public text may have classes, as in `_read_messages`.
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
    settings = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(settings)
    messages = _read_phrases(*(f"phone_{i + 1:02d}" for i in range(PHONES)))
    validation, test = (
        _examples(_read_phrases(name), TOPICS, settings, vocabulary)
        for name in ("validation", "test")
    )
    return Dataset(
        "phrases",
        make_task(settings, vocabulary, TOPICS),
        _examples(messages, TOPICS, settings, vocabulary, grouped=True),
        validation,
        test,
        simulated=True,
        about=f"{len(messages):,} messages of {PHONES} phones, {vocabulary.size:,} tokens",
        vocabulary=vocabulary,
    )


@register_source("phrases_public", keys=("text",))
def phrases_public(config: SourceConfig, _root: Path) -> Dataset:
    """Read the simulated public messages that define the vocabulary, for use as a proxy set."""
    settings = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(settings)
    messages = _read_phrases("public")
    return Dataset(
        "phrases_public",
        make_task(settings, vocabulary, TOPICS),
        _examples(messages, TOPICS, settings, vocabulary),
        simulated=True,
        about=f"{len(messages):,} public messages, {vocabulary.size:,} tokens",
        vocabulary=vocabulary,
    )


def _read_phrases(*names: str) -> list[Message]:
    """Return the messages in files of the package, whose classes are topics."""
    return _read_messages([PHRASES / f"{name}.txt" for name in names], labeled=True)


def _phrase_vocabulary(settings: TextConfig) -> Vocabulary:
    if settings.tokenizer == "hashing":
        return Vocabulary(buckets=settings.vocabulary)
    words = (message.words for message in _read_phrases("public"))
    return Vocabulary.from_texts(words, settings.vocabulary)

"""Texts: files of messages, and generated phone messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hetero_fl.config.data import SourceConfig, TextConfig
from hetero_fl.core.task import Task
from hetero_fl.data.dataset import Dataset, Examples, Vocabulary, index_names, split_words
from hetero_fl.data.registry import register_source
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import keyed_numpy_generator

# Texts from files: a message a line, and the words of them as tokens.


@register_source("text", keys=("path", "group", "text"))
def text(config: SourceConfig, root: Path) -> Dataset:
    """The lines of a text file, or of all `.txt` files of a folder, each line a message of its own.

    `group: file` says that each file of the folder is one client's. With `text.predict: class` a line is the class, a
    tabulator, and the message. Words are numbered by the file `text.public` or by hashing, never by what clients wrote.
    """
    settings = config.text or TextConfig()
    path = Path(str(config.path)).expanduser()
    if config.group not in (None, "file"):
        raise UserError(
            f"group: found '{config.group}'; choose file (a client for each file of the folder)"
        )
    files = _files(path)
    if config.group and path.is_file():
        raise UserError(
            f"group: found file, but path: {path} is one file; give a folder of .txt files"
        )
    vocabulary = _vocabulary(settings)
    messages: list[list[str]] = []
    classes: list[str] = []
    owners: list[str] = []
    for file in files:
        for number, line in read_lines(file, "path"):
            label, message = (
                _parts(line, f"path: {file}: line {number}")
                if settings.predict == "class"
                else ("", line)
            )
            words = split_words(message)
            if len(words) > (settings.predict == "next"):
                messages.append(words)
                classes.append(label)
                owners.append(file.stem)
    if not messages:
        least = "two words" if settings.predict == "next" else "a word"
        raise UserError(f"path: {path}: found no line of at least {least}")
    y, names = index_names(classes)
    train, whose = examples_of(messages, y.tolist(), settings, vocabulary)
    if len(train) == 0:
        raise UserError(
            f"text.public: {settings.public} has none of the words in {path}; take text of the same kind"
        )
    if config.group:
        group, train.group_names = index_names(owners)
        train.group = group[whose]
    task = task_of(settings, vocabulary, names)
    about = f"{len(messages):,} lines of {path.name}, {vocabulary.size:,} tokens"
    return Dataset("text", task, train, about=about, vocabulary=vocabulary)


def examples_of(
    texts: Sequence[Sequence[str]],
    classes: Sequence[int],
    settings: TextConfig,
    vocabulary: Vocabulary,
) -> tuple[Examples, Tensor]:
    """Examples of texts in words, and the number of each example's text, int64 `[N]`.

    Next words: the places of one text are never split up between sets (as rows of one patient are not).
    """
    if settings.predict == "class":
        examples = Examples(
            vocabulary.encode(texts, settings.length), torch.tensor(classes, dtype=torch.int64)
        )
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
    vocabulary = Vocabulary.from_texts(map(split_words, lines), settings.vocabulary)
    if len(vocabulary.words) < 2:
        raise UserError(
            f"text.public: {public}: found {len(vocabulary.words)} words that occur twice; give more text"
        )
    return vocabulary


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"path: {path}: no such file or folder{suggest_file(path)}")
    found = {file.name: file for file in path.glob("*.txt")}
    if not found:
        raise UserError(f"path: {path}: found no .txt file in this folder")
    return [found[name] for name in natural_order(found)]


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


# Messages typed on phones, generated by a grammar: for next words and for topics of texts.
# `simulated` is true.
#
# *A message* is a template with slots ("can you VERB the THING at the PLACE ?"), filled from the
# words of one of six topics. Words of a slot are said with frequencies 1, 1/2, 1/3 … in an order
# that the word before it turns by a fixed number of places: after "print" another thing is
# likeliest than after "sign". That is what there is to learn: the grammar and these pairs are the
# same for all.
#
# *A phone* has its own mix of topics (Dirichlet, 0.3) and of templates (Dirichlet, 1), writes 50 to
# 150 messages, and turns each topic's things by a number of places of its own in a quarter of its
# messages (a habit that only its own model can know). Where the grammar says WHO, it names one of
# its own three contacts in half of all cases. Contacts are private: no two phones share one, no
# public message has any, and no vocabulary taken from public text knows them.
#
# *Public messages* (`phrases_public`, and what the vocabulary is taken from) have all topics and
# templates alike, no habits and no contacts; so have the common validation and test sets, of
# messages that nobody else wrote.

PHONES = 12
PUBLIC = 400
COMMON = 250
CONTACTS = 3
ABOUT = "generated: messages by a grammar of six topics, phones with topics, habits and contacts of their own"
SLOTS = ("VERB", "THING", "PLACE", "QUALITY")
WORDS = {
    "work": (
        "send finish print check sign discuss review plan",
        "report invoice contract slides budget agenda offer draft schedule minutes",
        "office lobby desk archive canteen",
        "final urgent long confidential late",
    ),
    "food": (
        "cook buy taste order fry share freeze bake",
        "soup bread cheese salad rice curry cake pasta coffee apples",
        "kitchen market bakery restaurant garden",
        "fresh sweet spicy cold warm",
    ),
    "sport": (
        "watch win practise record join skip lead train",
        "match race game lap round goal tournament session warmup final",
        "stadium pool gym track court",
        "fast hard tough close easy",
    ),
    "travel": (
        "book pack cancel board catch rent miss change",
        "flight train ticket bag passport car tour ferry map seat",
        "airport station hotel border harbour",
        "early cheap crowded direct delayed",
    ),
    "health": (
        "take refill measure rest start stop count note",
        "pills dose tablets drops pulse temperature cream diet bandage therapy",
        "clinic pharmacy ward surgery laboratory",
        "daily strong mild painful weak",
    ),
    "home": (
        "clean fix paint move hang open water empty",
        "window door lamp shelf carpet sink heater plants curtain bin",
        "cellar attic garage balcony hall",
        "broken dusty wooden heavy old",
    ),
}
TOPICS = tuple(WORDS)
WHO = ["mum", "dad", "boss", "doctor", "neighbour", "sister", "brother", "teacher"]
WHEN = [
    "today",
    "tomorrow",
    "tonight",
    "on monday",
    "on friday",
    "next week",
    "this evening",
    "after lunch",
]
TEMPLATES = (
    "i will VERB the QUALITY THING WHEN .",
    "can you VERB the THING at the PLACE ?",
    "WHO wants to VERB the THING WHEN .",
    "please VERB the THING before you leave the PLACE .",
    "we meet WHO at the PLACE WHEN .",
    "the THING is QUALITY but WHO does not mind .",
    "where is the QUALITY THING ?",
    "thanks for the THING WHO !",
    "i am at the PLACE with WHO .",
    "did WHO VERB the QUALITY THING ?",
)
SYLLABLES = "bra del fi gor hun jel kas lom mir nev ost pri quo ril sav tun vor wex yan zub".split()  # noqa: SIM905


@dataclass(frozen=True)
class Writer:
    """Who writes: shares of topics `[6]` and of templates `[10]`, contacts, and by how much habit turns a topic's things."""

    topics: np.ndarray
    templates: np.ndarray
    contacts: tuple[str, ...] = ()
    habit: int = 0


@register_source("phrases", keys=("text",))
def phone_messages(config: SourceConfig, root: Path) -> Dataset:
    """Messages of twelve phones (groups), next words of them or, with `text.predict: class`, their topics."""
    text = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(text)
    texts: list[list[str]] = []
    topics: list[int] = []
    owners: list[int] = []
    for phone in range(PHONES):
        draws = keyed_numpy_generator("data", "phrases", "phone", phone)
        found = write_messages(writer(phone), int(draws.integers(50, 151)), draws)
        texts += [words for words, _ in found]
        topics += [topic for _, topic in found]
        owners += [phone] * len(found)
    train, whose = examples_of(texts, topics, text, vocabulary)
    train.group = torch.tensor(owners)[whose]
    train.group_names = tuple(f"phone_{i + 1:02d}" for i in range(PHONES))
    validation, test = (_public(text, vocabulary, name, COMMON) for name in ("validation", "test"))
    task = task_of(text, vocabulary, TOPICS)
    return Dataset(
        "phrases", task, train, validation, test, simulated=True, about=ABOUT, vocabulary=vocabulary
    )


@register_source("phrases_public", keys=("text",))
def phrases_public(config: SourceConfig, root: Path) -> Dataset:
    """The public messages from which the vocabulary is taken, for a proxy set."""
    text = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(text)
    task = task_of(text, vocabulary, TOPICS)
    train = _public(text, vocabulary, "public", PUBLIC)
    return Dataset(
        "phrases_public", task, train, simulated=True, about=ABOUT, vocabulary=vocabulary
    )


def writer(phone: int) -> Writer:
    """The owner of a phone."""
    draws = keyed_numpy_generator("data", "phrases", "writer", phone)
    names = _contacts()[CONTACTS * phone : CONTACTS * (phone + 1)]
    topics = draws.dirichlet([0.3] * len(TOPICS))
    templates = draws.dirichlet([1.0] * len(TEMPLATES))
    return Writer(topics, templates, names, int(draws.integers(1, 10)))


def public_writer() -> Writer:
    """Who writes public messages."""
    return Writer(
        np.full(len(TOPICS), 1 / len(TOPICS)), np.full(len(TEMPLATES), 1 / len(TEMPLATES))
    )


def write_messages(
    writer: Writer, count: int, draws: np.random.Generator
) -> list[tuple[list[str], int]]:
    """So many messages, each as its words and its topic."""
    topics = draws.choice(len(TOPICS), count, p=writer.topics)
    templates = draws.choice(len(TEMPLATES), count, p=writer.templates)
    turned = np.where(draws.random(count) < 0.25, writer.habit, 0)
    return [
        (
            _fill_template(TEMPLATES[template].split(), TOPICS[topic], writer, int(turn), draws),
            int(topic),
        )
        for topic, template, turn in zip(topics, templates, turned, strict=True)
    ]


def _fill_template(
    template: Sequence[str], topic: str, writer: Writer, turn: int, draws: np.random.Generator
) -> list[str]:
    said: list[str] = []
    for slot in template:
        if slot == "WHO":
            private = bool(writer.contacts) and draws.random() < 0.5
            said.append(_draw_word(writer.contacts if private else WHO, 0, draws))
        elif slot == "WHEN":
            said += _draw_word(WHEN, 0, draws).split()
        elif slot in SLOTS:
            words = WORDS[topic][SLOTS.index(slot)].split()
            before = len(said[-1]) + ord(said[-1][0])  # turns the order by the word before it
            said.append(_draw_word(words, before + (turn if slot == "THING" else 0), draws))
        else:
            said.append(slot)
    return said


def _draw_word(words: Sequence[str], turn: int, draws: np.random.Generator) -> str:
    """A word by the frequencies 1, 1/2, 1/3 …, the first of which belongs to the one at place `turn`."""
    frequencies = 1 / np.arange(1, len(words) + 1)
    place = int(draws.choice(len(words), p=frequencies / frequencies.sum()))
    return words[(place + turn) % len(words)]


def _contacts() -> tuple[str, ...]:
    """Names, three for each phone, all different."""
    pairs = [a + b for a in SYLLABLES for b in SYLLABLES if a != b]
    order = keyed_numpy_generator("data", "phrases", "contacts").permutation(len(pairs))
    return tuple(pairs[i] for i in order[: CONTACTS * PHONES])


def _public(text: TextConfig, vocabulary: Vocabulary, name: str, count: int) -> Examples:
    found = write_messages(public_writer(), count, keyed_numpy_generator("data", "phrases", name))
    return examples_of(
        [words for words, _ in found], [topic for _, topic in found], text, vocabulary
    )[0]


def _phrase_vocabulary(text: TextConfig) -> Vocabulary:
    """Of the public messages alone, whatever phones there are."""
    if text.tokenizer == "hashing":
        return Vocabulary(buckets=text.vocabulary)
    return Vocabulary.from_texts(
        (
            words
            for words, _ in write_messages(
                public_writer(), PUBLIC, keyed_numpy_generator("data", "phrases", "public")
            )
        ),
        text.vocabulary,
    )

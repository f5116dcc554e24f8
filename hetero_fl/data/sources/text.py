"""Text sources: files with one message per line, and generated phone messages.

Vocabularies are defined by public text or by hashing, never by the texts of clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
from hetero_fl.data.sources.files import read_lines
from hetero_fl.utils.errors import UserError, suggest_file
from hetero_fl.utils.ordering import natural_order
from hetero_fl.utils.seeding import keyed_numpy_generator
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


PHONES = 12
PUBLIC_MESSAGES = 400
COMMON_MESSAGES = 250
CONTACTS = 3
ABOUT = (
    "generated: messages by a grammar of six topics, phones with topics, habits and contacts of "
    "their own"
)
PLACEHOLDERS = ("VERB", "THING", "PLACE", "QUALITY")
"""Words of a template that stand for a word of the topic, in the order of the lists in `WORDS`."""
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
SYLLABLES = (
    "bra",
    "del",
    "fi",
    "gor",
    "hun",
    "jel",
    "kas",
    "lom",
    "mir",
    "nev",
    "ost",
    "pri",
    "quo",
    "ril",
    "sav",
    "tun",
    "vor",
    "wex",
    "yan",
    "zub",
)


@dataclass(frozen=True)
class Writer:
    """A writer of messages.

    Attributes:
        topics: Probabilities of the topics, shape `[6]`.
        templates: Probabilities of the templates, shape `[10]`.
        contacts: Names of private contacts.
        habit: Shift of the word frequencies of nouns, which applies to a quarter of the messages.
    """

    topics: np.ndarray
    templates: np.ndarray
    contacts: tuple[str, ...] = ()
    habit: int = 0


@register_source("phrases", keys=("text",))
def phone_messages(config: SourceConfig, _root: Path) -> Dataset:
    """Generate the messages of twelve phones (groups), for next-word or topic prediction.

    Messages are templates filled with words of one of six topics. The frequencies of words depend
    on the preceding word. Each phone has its own mix of topics and templates, its own shift of word
    frequencies, and three private contacts whose names do not occur in public text.
    """
    text = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(text)
    texts: list[list[str]] = []
    topics: list[int] = []
    owners: list[int] = []
    for phone in range(PHONES):
        rng = keyed_numpy_generator("data", "phrases", "phone", phone)
        messages = write_messages(make_writer(phone), int(rng.integers(50, 151)), rng)
        texts += [words for words, _ in messages]
        topics += [topic for _, topic in messages]
        owners += [phone] * len(messages)
    train, text_indices = make_examples(texts, topics, text, vocabulary)
    train.group = torch.tensor(owners)[text_indices]
    train.group_names = tuple(f"phone_{i + 1:02d}" for i in range(PHONES))
    validation = _public_examples(text, vocabulary, "validation", COMMON_MESSAGES)
    test = _public_examples(text, vocabulary, "test", COMMON_MESSAGES)
    task = make_task(text, vocabulary, TOPICS)
    return Dataset(
        "phrases", task, train, validation, test, simulated=True, about=ABOUT, vocabulary=vocabulary
    )


@register_source("phrases_public", keys=("text",))
def phrases_public(config: SourceConfig, _root: Path) -> Dataset:
    """Generate the public messages that define the vocabulary, for use as a proxy set."""
    text = config.text or TextConfig()
    vocabulary = _phrase_vocabulary(text)
    task = make_task(text, vocabulary, TOPICS)
    train = _public_examples(text, vocabulary, "public", PUBLIC_MESSAGES)
    return Dataset(
        "phrases_public", task, train, simulated=True, about=ABOUT, vocabulary=vocabulary
    )


def make_writer(phone: int) -> Writer:
    """Generate the writer of the messages of a phone."""
    rng = keyed_numpy_generator("data", "phrases", "writer", phone)
    names = _contacts()[CONTACTS * phone : CONTACTS * (phone + 1)]
    topics = rng.dirichlet([0.3] * len(TOPICS))
    templates = rng.dirichlet([1.0] * len(TEMPLATES))
    return Writer(topics, templates, names, int(rng.integers(1, 10)))


def public_writer() -> Writer:
    """Return the writer of public messages, without contacts or habits and with uniform shares."""
    return Writer(
        np.full(len(TOPICS), 1 / len(TOPICS)), np.full(len(TEMPLATES), 1 / len(TEMPLATES))
    )


def write_messages(
    writer: Writer, count: int, rng: np.random.Generator
) -> list[tuple[list[str], int]]:
    """Generate the messages of a writer.

    Args:
        writer: Writer of the messages.
        count: Number of messages.
        rng: Random generator.

    Returns:
        Words and topic of each message.
    """
    topics = rng.choice(len(TOPICS), count, p=writer.topics)
    templates = rng.choice(len(TEMPLATES), count, p=writer.templates)
    shifts = np.where(rng.random(count) < 0.25, writer.habit, 0)
    return [
        (
            _fill_template(TEMPLATES[template].split(), TOPICS[topic], writer, int(shift), rng),
            int(topic),
        )
        for topic, template, shift in zip(topics, templates, shifts, strict=True)
    ]


def _fill_template(
    template: Sequence[str], topic: str, writer: Writer, shift: int, rng: np.random.Generator
) -> list[str]:
    message: list[str] = []
    for part in template:
        if part == "WHO":
            private = bool(writer.contacts) and rng.random() < 0.5
            message.append(_sample_word(writer.contacts if private else WHO, 0, rng))
        elif part == "WHEN":
            message += _sample_word(WHEN, 0, rng).split()
        elif part in PLACEHOLDERS:
            words = WORDS[topic][PLACEHOLDERS.index(part)].split()
            # The preceding word shifts the frequencies, so that there are word pairs to learn.
            previous = len(message[-1]) + ord(message[-1][0])
            offset = previous + (shift if part == "THING" else 0)
            message.append(_sample_word(words, offset, rng))
        else:
            message.append(part)
    return message


def _sample_word(words: Sequence[str], shift: int, rng: np.random.Generator) -> str:
    """Sample a word with frequencies 1, 1/2, 1/3, …, starting at the word with index `shift`."""
    frequencies = 1 / np.arange(1, len(words) + 1)
    index = int(rng.choice(len(words), p=frequencies / frequencies.sum()))
    return words[(index + shift) % len(words)]


def _contacts() -> tuple[str, ...]:
    """Return the distinct names of all private contacts, three for each phone."""
    pairs = [a + b for a in SYLLABLES for b in SYLLABLES if a != b]
    order = keyed_numpy_generator("data", "phrases", "contacts").permutation(len(pairs))
    return tuple(pairs[i] for i in order[: CONTACTS * PHONES])


def _public_examples(text: TextConfig, vocabulary: Vocabulary, name: str, count: int) -> Examples:
    rng = keyed_numpy_generator("data", "phrases", name)
    messages = write_messages(public_writer(), count, rng)
    texts = [words for words, _ in messages]
    topics = [topic for _, topic in messages]
    return make_examples(texts, topics, text, vocabulary)[0]


def _phrase_vocabulary(text: TextConfig) -> Vocabulary:
    if text.tokenizer == "hashing":
        return Vocabulary(buckets=text.vocabulary)
    rng = keyed_numpy_generator("data", "phrases", "public")
    messages = write_messages(public_writer(), PUBLIC_MESSAGES, rng)
    return Vocabulary.from_texts((words for words, _ in messages), text.vocabulary)

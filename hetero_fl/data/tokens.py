"""Words as numbers: a vocabulary taken from public text alone, or by hashing, for which no text is read at all."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EMPTY, UNKNOWN, FIRST = 0, 1, 2
"""No word, a word that is not in the vocabulary, the first word."""
WORD = re.compile(r"\w+(?:['’-]\w+)*|[.!?]")


def split_words(text: str) -> list[str]:
    """The words of a text in lower case; full stop, question and exclamation mark are words, other marks are left out."""
    return WORD.findall(text.lower())


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers of tokens mean: 0 no word, 1 unknown, then `words`; or, without words, that many `buckets`.

    Equal vocabularies give equal numbers.
    """

    words: tuple[str, ...] = ()
    buckets: int = 0

    def __repr__(self) -> str:
        return f"Vocabulary({self.size:,} tokens, {'hashed' if self.buckets else f'{len(self.words):,} words'})"

    @classmethod
    def of(cls, public: Iterable[Sequence[str]], most: int) -> Vocabulary:
        """The most frequent words of public texts, equally frequent ones by the alphabet; a word said once is not taken."""
        counts = Counter(word for words in public for word in words)
        frequent = sorted((w for w, n in counts.items() if n > 1), key=lambda word: (-counts[word], word))
        return cls(tuple(frequent[:most]))

    @property
    def size(self) -> int:
        """How many different tokens there are."""
        return FIRST + (self.buckets or len(self.words))

    @property
    def names(self) -> tuple[str, ...]:
        """What to call each token from the first word on: the word, or the bucket's number."""
        return self.words or tuple(f"#{i}" for i in range(self.buckets))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: FIRST + i for i, word in enumerate(self.words)}

    def number(self, word: str) -> int:
        """The token of a word."""
        if not self.buckets:
            return self._places.get(word, UNKNOWN)
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()  # the same in every process and release
        return FIRST + int.from_bytes(digest, "big") % self.buckets

    def encode(self, texts: Iterable[str | Sequence[str]], length: int) -> Tensor:
        """Texts as tokens, int64 `[N, length]`: their last words, filled up from the left."""
        rows = [self.numbers(text)[-length:] for text in texts]
        filled = [[EMPTY] * (length - len(row)) + row for row in rows]
        return torch.tensor(filled, dtype=torch.int64).reshape(-1, length)

    def numbers(self, text: str | Sequence[str]) -> list[int]:
        """The tokens of a text, or of its words."""
        return [self.number(word) for word in (split_words(text) if isinstance(text, str) else text)]

    def continuations(self, texts: Iterable[Sequence[str]], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every place of every text at which a known word follows on another word.

        Returns:
            The words before it, int64 `[N, length]`; its place in `names`, int64 `[N]`; the number of the text, int64 `[N]`.
            Unknown words stand among those before, but are never asked for.
        """
        before, following, whose = [], [], []
        for number, words in enumerate(texts):
            tokens = self.numbers(words)
            for place in range(1, len(tokens)):
                if tokens[place] != UNKNOWN:
                    row = tokens[max(0, place - length) : place]
                    before.append([EMPTY] * (length - len(row)) + row)
                    following.append(tokens[place] - FIRST)
                    whose.append(number)
        x = torch.tensor(before, dtype=torch.int64).reshape(-1, length)
        return x, torch.tensor(following, dtype=torch.int64), torch.tensor(whose, dtype=torch.int64)

"""A needle in a haystack, as in RULER (arXiv 2404.06654): a sentence to be found again in a long text.

Two things differ from it, so that nothing needs to be downloaded: a text of one's own takes the place of the essays,
and the words of keys come from a short list.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipeline.tokenizer import Tokenizer
from loglinear.errors import UserError
from loglinear.experiments.examples import Cell, Examples

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
OPENING = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards."
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = "What is the special magic {kind} for {key} mentioned in the provided text?"
ANSWER = " The special magic {kind} for {key} mentioned in the provided text is"
DEPTHS = 40  # places for needles, from the text's first sentence to its end
ADJECTIVES = (
    "able bitter brave calm crisp daring dull eager early faint fierce gentle hollow idle jolly keen lazy merry narrow"
    " odd pale quiet rapid silent tame usual vivid weary young zealous"
)
NOUNS = (
    "anchor barrel bottle candle castle desert dragon engine feather forest garden hammer harbour island jacket kettle"
    " ladder lantern mirror needle orchard pencil quarry ribbon saddle temple umbrella valley window yard"
)


@dataclass(frozen=True)
class Form:
    """What a form of the task looks like."""

    haystack: Literal["noise", "text"]
    value: Literal["number", "uuid"]
    needles: int


FORMS = {
    "single_1": Form("noise", "number", 1),
    "single_2": Form("text", "number", 1),
    "single_3": Form("text", "uuid", 1),
    "multikey_1": Form("text", "number", 4),
}


@dataclass(frozen=True)
class Prompt:
    """A text that ends where the answer begins, and that answer."""

    text: str
    answer: str


def make_prompt(
    form: Form, haystack: list[str], sentences: int, rng: np.random.Generator, depth: float | None = None
) -> Prompt:
    """Needles between `sentences` sentences of the haystack, and the question for one of them.

    Args:
        form: what to hide and where.
        haystack: sentences of a text; the noise, if the form asks for it, needs none.
        sentences: how many of them.
        rng: decides keys, values and places.
        depth: the share of the sentences that stand before the needle that is asked for; None leaves it to chance.
    """
    keys = [_word(rng) for _ in range(form.needles)]
    while len(set(keys)) < len(keys):
        keys = [_word(rng) for _ in range(form.needles)]
    values = [_value(form, rng) for _ in keys]
    needles = [NEEDLE.format(kind=form.value, key=key, value=value) for key, value in zip(keys, values, strict=True)]
    hay = [NOISE] * sentences if form.haystack == "noise" else haystack[:sentences]
    places = rng.choice(DEPTHS, size=len(needles), replace=False) * sentences // (DEPTHS - 1)
    asked = int(rng.integers(form.needles))
    if depth is not None:
        places[asked] = round(depth * sentences)
    for place, needle in sorted(zip(places.tolist(), needles, strict=True), reverse=True):
        hay = [*hay[:place], needle, *hay[place:]]
    words = {"kind": form.value, "key": keys[asked]}
    separator = "\n" if form.haystack == "noise" else " "
    parts = (OPENING.format(**words), separator.join(hay), QUESTION.format(**words) + ANSWER.format(**words))
    return Prompt("\n".join(parts), f" {values[asked]}")


def needle_examples(
    form: Form,
    cell: Cell,
    haystack: list[str],
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    depth: float | None = None,
) -> Examples:
    """Prompts of nearly `cell.length` tokens with their answers; every token of an answer is due.

    A model answers greedily right exactly if all of these are its likeliest tokens.

    Args:
        form: what to hide and where.
        cell: tokens a row, and how many rows.
        haystack: sentences of a text; each prompt starts at a random one.
        tokenizer: of the model that is tested.
        rng: decides everything else.
        depth: as for `make_prompt`.

    Raises:
        UserError: the haystack is shorter than a row.
    """
    rows = [_row(form, cell.length, haystack, tokenizer, rng, depth) for _ in range(cell.examples)]
    most = max(len(answer) for _, answer in rows)
    tokens_et = np.zeros((cell.examples, cell.length), np.int64)
    positions_en = np.zeros((cell.examples, most), np.int64)
    labels_en = np.full((cell.examples, most), -100)
    for row, (prompt, answer) in enumerate(rows):
        whole = [*prompt, *answer]
        tokens_et[row, : len(whole)] = whole
        positions_en[row, : len(answer)] = np.arange(len(prompt) - 1, len(whole) - 1)
        labels_en[row, : len(answer)] = answer
    return Examples.of(tokens_et, positions_en, labels_en)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, about: it is cut behind each full stop that a space follows."""
    return [part if part.endswith(".") else part + "." for part in " ".join(text.split()).split(". ") if part]


def _row(
    form: Form, length: int, haystack: list[str], tokenizer: Tokenizer, rng: np.random.Generator, depth: float | None
) -> tuple[list[int], list[int]]:
    """The longest prompt that fits, and its answer."""
    start = 0 if form.haystack == "noise" else int(rng.integers(len(haystack)))
    hay = haystack[start:] + haystack[:start]
    seed = int(rng.integers(2**63))

    def encoded(sentences: int) -> tuple[list[int], list[int]]:
        prompt = make_prompt(form, hay, sentences, np.random.default_rng(seed), depth)
        return [tokenizer.bos_id, *tokenizer.encode(prompt.text)], tokenizer.encode(prompt.answer)

    most = _longest(lambda sentences: sum(map(len, encoded(sentences))) <= length, length)
    if most < 1 or (form.haystack == "text" and most > len(haystack)):
        raise UserError(f"needles in {length} tokens need a haystack that is longer, or a question that is shorter")
    return encoded(most)


def _longest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number in 0 .. limit that fits, where smaller ones fit if larger ones do; tries few large ones."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high - 1, limit)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _word(rng: np.random.Generator) -> str:
    return "-".join(str(rng.choice(words.split())) for words in (ADJECTIVES, NOUNS))


def _value(form: Form, rng: np.random.Generator) -> str:
    if form.value == "number":
        return str(rng.integers(10**6, 10**7))
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))

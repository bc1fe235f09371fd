"""Words of a prompt as people write them, such as ``red hat``, ``dog#2`` and ``swimming:2.0``, and their tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..prompt import TokenSpan
from .alignment import find_frames
from .schedule import StepRange

END_WORD = "<end>"  # the end of a prompt: <eos> and padding, in which the text encoder sums up what stands before them
SEPARATORS = re.compile(r"[,;\n]")
OCCURRENCE = re.compile(r"(.+?)\s*#\s*(\d+)")
RANGE = re.compile(r"(?:([\d.]+)\s*-\s*)?([\d.]+)")


class WordWeight(NamedTuple):
    """The weight of a phrase.

    Args:
        phrase: One or more words, such as ``red hat`` or ``dog#2``.
        weight: Factor on the attention to them.
    """

    phrase: str
    weight: float


class WordRange(NamedTuple):
    """The range of steps of a phrase.

    Args:
        phrase: One or more words, such as ``red hat`` or ``dog#2``.
        range: The steps.
    """

    phrase: str
    range: StepRange


def parse_words(text: str) -> list[str]:
    """Split a list of words: ``"dog, red hat"`` -> ["dog", "red hat"].

    Args:
        text: Phrases with commas, semicolons or line breaks between them.

    Returns:
        The phrases in order, without empty ones.
    """
    return [item.strip() for item in SEPARATORS.split(text) if item.strip()]


def parse_word_weights(text: str) -> list[WordWeight]:
    """Parse words with weights: ``"swimming:2.0, red hat:-0.5"`` -> [("swimming", 2.0), ("red hat", -0.5)].

    Args:
        text: Items as for :func:`parse_words`; an empty text gives an empty list.

    Returns:
        The phrases with their weights, in order.

    Raises:
        ValueError: If an item is not a word, a colon and a finite number.
    """
    weights = []
    for item in parse_words(text):
        phrase, _, number = (field.strip() for field in item.rpartition(":"))
        weight = read_number(number)
        if not phrase or weight is None:
            raise ValueError(
                f'"{item}" is no word with a weight: write the word, a colon and a number, such as swimming:2.0, with '
                "commas between several."
            )
        weights.append(WordWeight(phrase, weight))
    return weights


def parse_word_ranges(text: str) -> list[WordRange]:
    """Parse words with ranges of steps: ``"dog:0.5, hat:0.2-0.9"`` -> [("dog", 0 to 0.5), ("hat", 0.2 to 0.9)].

    Args:
        text: Items as for :func:`parse_words`; an empty text gives an empty list.

    Returns:
        The phrases with their ranges of steps, in order.

    Raises:
        ValueError: If an item is not a word, a colon and one or two numbers from 0 to 1, the second not the smaller.
    """
    ranges = []
    for item in parse_words(text):
        phrase, _, numbers = (field.strip() for field in item.rpartition(":"))
        match = RANGE.fullmatch(numbers)
        start, end = (read_number(match[1] or "0"), read_number(match[2])) if match else (None, None)
        if not phrase or start is None or end is None or not 0 <= start <= end <= 1:
            raise ValueError(
                f'"{item}" is no word with a part of the steps: write the word, a colon and where it ends, such as '
                "dog:0.5, or where it starts and ends, such as dog:0.2-0.9, between 0 and 1."
            )
        ranges.append(WordRange(phrase, StepRange(start, end)))
    return ranges


def find_phrase(spans: Sequence[TokenSpan], phrase: str) -> tuple[int, ...]:
    """Find the tokens of a phrase: of all its occurrences, or with ``#2`` of the second alone.

    Args:
        spans: The words of a prompt in order, as :func:`~blip_qformer.prompt.find_words` gives them.
        phrase: One or more words, in any case. A word that CLIP reads as several, such as ``8k``, is found too.

    Returns:
        The positions of the tokens.

    Raises:
        ValueError: If the prompt does not have it, or not that often.
    """
    match = OCCURRENCE.fullmatch(phrase.strip())
    written, number = (match[1], int(match[2])) if match else (phrase, None)
    wanted = written.lower().split()
    found = [positions for start in range(len(spans)) if wanted and (positions := _match_at(spans, start, wanted))]
    if not found:
        raise ValueError(f'There is no "{written.strip()}" in this prompt; its words are: {_word_list(spans)}.')
    if number is None:
        return tuple(position for positions in found for position in positions)
    if not 1 <= number <= len(found):
        raise ValueError(
            f'"{phrase.strip()}" asks for number {number} of "{written.strip()}", but this prompt has {len(found)}: '
            f"write a number from 1 to {len(found)}."
        )
    return found[number - 1]


def find_in_prompts(prompts: Sequence[Sequence[TokenSpan]], phrase: str) -> list[tuple[int, ...]]:
    """Find the tokens of a phrase in each of several prompts.

    Args:
        prompts: The words of each prompt in order.
        phrase: A phrase, see :func:`find_phrase`.

    Returns:
        The positions of the tokens in each prompt, empty where it does not have the phrase.

    Raises:
        ValueError: If no prompt has it.
    """
    found: list[tuple[int, ...]] = []
    missing: ValueError | None = None
    for spans in prompts:
        try:
            found.append(find_phrase(spans, phrase))
        except ValueError as error:
            found.append(())
            missing = error
    if missing is not None and not any(found):
        raise missing
    return found


def with_end(spans: Sequence[TokenSpan], tokens: int) -> list[TokenSpan]:
    """Add the word ``<end>`` to a prompt: in each block its end-of-text token and padding.

    Args:
        spans: The words of the prompt in order.
        tokens: Number of tokens of the prompt.

    Returns:
        The words, and behind all of them one ``<end>`` for each block.
    """
    return [*spans, *(TokenSpan(END_WORD, tuple(frame.end)) for frame in find_frames(spans, tokens))]


def weight_tokens(
    prompts: Sequence[Sequence[TokenSpan]], weights: Sequence[WordWeight], tokens: Sequence[int]
) -> list[Tensor]:
    """Spread the weights of words, also of ``<end>``, over the tokens of prompts.

    Args:
        prompts: The words of each prompt in order.
        weights: The weights; of two for the same token, the later one counts.
        tokens: Number of tokens of each prompt.

    Returns:
        For each prompt the factors of its tokens, of shape [tokens], 1 where no word has a weight.

    Raises:
        ValueError: If a word stands in none of the prompts.
    """
    prompts = [with_end(spans, count) for spans, count in zip(prompts, tokens, strict=True)]
    factors = [torch.ones(count) for count in tokens]
    for phrase, weight in weights:
        for factor, positions in zip(factors, find_in_prompts(prompts, phrase), strict=True):
            factor[list(positions)] = weight
    return factors


def readable(word: str) -> str:
    """Spell a word of CLIP's vocabulary as people do: ``cafÃ©`` -> ``café``.

    Args:
        word: A word in which each character stands for a byte of UTF-8.

    Returns:
        The word as it is written; unchanged if it is not from the vocabulary.
    """
    try:
        return bytes(_BYTES[character] for character in word).decode("utf-8")
    except (KeyError, UnicodeDecodeError):  # not from the vocabulary, or cut in the middle of a character
        return word


def _match_at(spans: Sequence[TokenSpan], start: int, wanted: Sequence[str]) -> tuple[int, ...]:
    """The positions of a phrase that begins at one span, or none; each wanted word is one or more consecutive spans."""
    positions: list[int] = []
    index = start
    for word in wanted:
        spelled = ""
        while len(spelled) < len(word) and index < len(spans):
            spelled += readable(spans[index].word)
            positions.extend(spans[index].positions)
            index += 1
        if spelled != word:
            return ()
    return tuple(positions)


def _word_list(spans: Sequence[TokenSpan]) -> str:
    words = (readable(span.word) for span in spans)
    return ", ".join(dict.fromkeys(word for word in words if word not in ",;" and word != END_WORD)) or "none"


def read_number(text: str) -> float | None:
    """Read a number that a user wrote.

    Args:
        text: What was written.

    Returns:
        The number; None if it is none, or not finite.
    """
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _byte_characters() -> dict[str, int]:
    """The characters of a byte-level vocabulary: printable bytes are themselves, the others begin at 256 (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_characters()

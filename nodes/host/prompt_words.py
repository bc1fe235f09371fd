"""The words of a conditioning found again: noted in it, or in the text that it was encoded from.

Other nodes join and combine conditionings. Concat puts the tokens of one behind those of another, and keeps what the
first one notes; Combine makes a list of both. So the text of a part is looked for in all of the conditioning, by
encoding it once more. Other nodes encode it differently, with weights as other programs read them; then the number of
its tokens says where it stands. Tokens whose words stay unknown are one word, ``<joined>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import comfy.sd
from torch import Tensor

from ...blip_qformer.attention.alignment import BLOCK
from ...blip_qformer.prompt import JOINED_WORD, TokenSpan, fill_blocks, find_words
from .checks import require_clip_l_for_edits
from .conditioning import TOKEN_SPANS, Conditioning, encode_tokens, read_tokens

#: The host's: when an entry acts, in parts of the sampling run; of a CLIP's scheduled hooks, and of the entry's own.
RANGE = ("clip_start_percent", "clip_end_percent", "start_percent", "end_percent")

#: Greatest difference, in units of an encoding's spread, of the same text encoded twice in half precision.
ROUNDING = 2e-2


def token_spans(conditioning: Conditioning, clip: comfy.sd.CLIP | None, text: str) -> list[list[TokenSpan]]:
    """Find the words of each entry of a conditioning: as Subject Prompt Compose noted them, else in a text.

    Args:
        conditioning: Conditioning of one or more entries.
        clip: Text encoder that a stock conditioning was encoded with.
        text: Text that a stock conditioning was encoded from; of joined or combined ones, a line for each.

    Returns:
        The words of each entry in order; tokens of which nothing is known are the word ``<joined>``.

    Raises:
        ValueError: A conditioning does not know its words and there is no CLIP, or it was not encoded from this text.
    """
    entries = [Entry(tensor, options) for tensor, options in conditioning]
    if any(not entry.is_known for entry in entries) and clip is not None and text.strip():
        find_text(clip, text, [entry for entry in entries if not entry.is_known])
    elif any(entry.spans is None for entry in entries):
        raise ValueError(
            "This conditioning does not say which token is which word: take it from Subject Prompt Compose, or connect "
            "the clip it was encoded with and write its text."
        )
    return [entry.all_spans() for entry in entries]


class Entry:
    """An entry of a conditioning, and what is known of its words.

    Args:
        encoded: Its encoding, of shape [B, tokens, width].
        options: Its dictionary in the conditioning.
    """

    def __init__(self, encoded: Tensor, options: dict[str, Any]) -> None:
        self.encoded = encoded
        self.range = tuple(options.get(each) for each in RANGE)
        spans: list[TokenSpan] | None = options.get(TOKEN_SPANS)
        self.spans = spans
        self.known = 0 if spans is None else tokens_of(spans)  # number of tokens, from the first one on

    @property
    def tokens(self) -> int:
        """Number of tokens of the encoding."""
        return self.encoded.shape[1]

    @property
    def is_known(self) -> bool:
        """Whether it notes the words of all of its tokens."""
        return self.known >= self.tokens

    def add(self, spans: Sequence[TokenSpan], offset: int) -> None:
        """Add words.

        Args:
            spans: The words, with positions in their own text.
            offset: Position of the text in the encoding.
        """
        moved = [TokenSpan(span.word, tuple(offset + each for each in span.positions)) for span in spans]
        self.spans = [*(self.spans or ()), *moved]

    def all_spans(self) -> list[TokenSpan]:
        """Return its words in order, with ``<joined>`` for each block in which none is known."""
        spans = self.spans or []
        blocks = {position // BLOCK for span in spans for position in span.positions} | {*range(self.known // BLOCK)}
        joined = [
            TokenSpan(JOINED_WORD, tuple(range(start + 1, min(start + BLOCK, self.tokens))))
            for start in range(0, self.tokens, BLOCK)
            if start // BLOCK not in blocks
        ]
        return sorted([*spans, *joined], key=lambda span: span.positions[0])


def find_text(clip: comfy.sd.CLIP, text: str, entries: Sequence[Entry]) -> None:
    """Add the words of a text to the entries that were encoded from it.

    Args:
        clip: Text encoder.
        text: The text, or a line for each text that was joined or combined.
        entries: Entries that do not know all of their words.

    Raises:
        ValueError: The CLIP is not SD1.5's, or the conditioning was not encoded from this text.
    """
    require_clip_l_for_edits(clip)
    width = entries[0].encoded.shape[-1]
    whole = TextPart(clip, text, width)
    lines = [TextPart(clip, line, width) for line in text.splitlines() if line.strip()]
    fits = all(entry.known == 0 and entry.tokens == whole.tokens for entry in entries)
    if fits and len(entries) == 1:
        layout = [(entries[0], whole, 0)]
    else:
        layout = (
            find_all(entries, [whole])
            or find_all(entries, lines)
            or lay_out(entries, lines)
            or ([(entry, whole, 0) for entry in entries] if fits and follow_each_other(entries) else [])
        )
    if layout:
        for entry, part, offset in layout:
            entry.add(part.spans, offset)
    elif fits:
        raise ValueError(
            f"The text is found in none of the {len(entries)} prompts of this conditioning: write the texts that they "
            "were encoded from, a line for each, in their order."
        )
    else:
        tokens = max(entry.tokens for entry in entries)
        raise ValueError(
            f"The text makes {whole.tokens} tokens and the conditioning has {tokens}: write the text that the "
            "conditioning was encoded from. If Concat, Combine, BREAK or AND made it of several, write a line for each "
            "text, in their order."
        )


def find_all(entries: Sequence[Entry], parts: Sequence[TextPart]) -> Layout:
    """Find texts by their encodings.

    Args:
        entries: Entries of a conditioning.
        parts: The texts in order.

    Returns:
        Everywhere that each of them stands; nothing if one of them is nowhere.
    """
    found = [(entry, part, offset) for entry in entries for part, offset in find_parts(parts, entry)]
    return found if {part for _, part, _ in found} == {*parts} else []


def lay_out(entries: Sequence[Entry], parts: Sequence[TextPart]) -> Layout:
    """Lay texts out by their numbers of tokens, one behind the other.

    Args:
        entries: Entries of a conditioning.
        parts: The texts in order.

    Returns:
        Where each of them stands; nothing if they do not fill the entries, or if one is found elsewhere.
    """
    layout: Layout = []
    left = [*parts]
    for entry in entries:
        position = entry.known
        while left and position + left[0].tokens <= entry.tokens:
            part = left.pop(0)
            layout.append((entry, part, position))
            position += part.tokens
        if position != entry.tokens:
            return []
    found = {(entry, part.text, offset) for entry in entries for part, offset in find_parts(parts, entry)}
    return layout if not left and found <= {(entry, part.text, offset) for entry, part, offset in layout} else []


def follow_each_other(entries: Sequence[Entry]) -> bool:
    """Return whether each entry has a range of steps of its own, as those that a schedule makes of one prompt.

    Args:
        entries: Entries of a conditioning.
    """
    return len({entry.range for entry in entries}) == len(entries)


def find_parts(parts: Sequence[TextPart], entry: Entry) -> list[tuple[TextPart, int]]:
    """Find texts that stand one behind the other in an entry.

    Args:
        parts: The texts in order.
        entry: An entry of a conditioning.

    Returns:
        The texts that are there, and the position of the first token of each.
    """
    found: list[tuple[TextPart, int]] = []
    start = entry.known
    for part in parts:
        offset = part.find(entry.encoded, start)
        if offset is not None:
            found.append((part, offset))
            start = offset + part.tokens
    return found


class TextPart:
    """A text, its words, and what the text encoder makes of it.

    Args:
        clip: Text encoder.
        text: The text.
        width: Width of the encoding.
    """

    def __init__(self, clip: comfy.sd.CLIP, text: str, width: int) -> None:
        self.clip = clip
        self.text = text
        self.read = read_tokens(clip, text, width)
        blocks = fill_blocks(self.read, BLOCK - 2, "continue")
        self.tokens = len(blocks) * BLOCK
        self.spans = find_words(blocks, BLOCK)

    @cached_property
    def encodings(self) -> list[Tensor]:
        """Its encoding of shape [1, tokens, width]; with a schedule of the CLIP's hooks, one for each range."""
        return [tensor.float().cpu() for tensor, _ in encode_tokens(self.clip, self.read, "continue")]

    def find(self, encoded: Tensor, start: int) -> int | None:
        """Find where the text stands in an encoding.

        Args:
            encoded: Encoding of shape [B, tokens, width].
            start: First position that may be meant.

        Returns:
            Position of its first token, None if it is not there.
        """
        for offset in range(start, encoded.shape[1] - self.tokens + 1, BLOCK):
            window = encoded[:, offset : offset + self.tokens].float().cpu()
            if any((window - each).abs().max() <= ROUNDING * each.std() for each in self.encodings):
                return offset
        return None


#: Entries, and the texts that stand in them from a position on.
Layout = list[tuple[Entry, TextPart, int]]


def tokens_of(spans: Sequence[TokenSpan]) -> int:
    """Return the number of tokens of the blocks that words fill; the last block of a prompt is never empty.

    Args:
        spans: The words in order.
    """
    last = max((position for span in spans for position in span.positions), default=0)
    return (last // BLOCK + 1) * BLOCK

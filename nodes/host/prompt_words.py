"""The words of a conditioning found again: noted in it, or in the text that it was encoded from.

Other nodes join and combine conditionings. Concat puts the tokens of one behind those of another, and keeps what the
first one notes; Combine makes a list of both. So the text of a part is looked for in all of the conditioning, by
encoding it once more. Tokens whose words stay unknown are one word, ``<joined>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import comfy.sd
from torch import Tensor

from ...blip_qformer.attention.alignment import BLOCK
from ...blip_qformer.prompt import JOINED_WORD, TokenSpan, fill_blocks, find_words
from .checks import require_clip_l_for_edits
from .conditioning import TOKEN_SPANS, Conditioning, encode_tokens, read_tokens

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
    entries = [Entry(tensor, options.get(TOKEN_SPANS)) for tensor, options in conditioning]
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
        spans: The words that it notes; None if it notes none.
    """

    def __init__(self, encoded: Tensor, spans: list[TokenSpan] | None) -> None:
        self.encoded = encoded
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
    fits = all(entry.known == 0 and entry.tokens == whole.tokens for entry in entries)
    if not (fits and len(entries) == 1):
        for parts in ([whole], [TextPart(clip, line, width) for line in text.splitlines() if line.strip()]):
            found = [(entry, part, offset) for entry in entries for part, offset in find_parts(parts, entry)]
            if {part for _, part, _ in found} == {*parts}:
                for entry, part, offset in found:
                    entry.add(part.spans, offset)
                return
    if not fits:
        tokens = max(entry.tokens for entry in entries)
        raise ValueError(
            f"The text makes {whole.tokens} tokens and the conditioning has {tokens}: write the text that the "
            "conditioning was encoded from. If Concat or Combine made it of several, write a line for each text."
        )
    for entry in entries:  # the only one, or changed by nodes such as Average
        entry.add(whole.spans, 0)


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


def tokens_of(spans: Sequence[TokenSpan]) -> int:
    """Return the number of tokens of the blocks that words fill; the last block of a prompt is never empty.

    Args:
        spans: The words in order.
    """
    last = max((position for span in spans for position in span.positions), default=0)
    return (last // BLOCK + 1) * BLOCK

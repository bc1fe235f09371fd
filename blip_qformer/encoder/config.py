"""The sizes of a subject encoder. The defaults are the published model's (arXiv 2305.14720, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import AllowInfNan, ConfigDict, Field, Strict, model_validator
from pydantic.dataclasses import dataclass

from ..limits import MAX_HEADS, MAX_IMAGE_SIZE, MAX_LAYERS, MAX_POSITIONS, MAX_VOCABULARY, MAX_WIDTH
from ..plain_data import needs, validate, whole_number

Width = Annotated[int, whole_number(1, MAX_WIDTH)]
Heads = Annotated[int, whole_number(1, MAX_HEADS)]
Layers = Annotated[int, whole_number(1, MAX_LAYERS)]
Positions = Annotated[int, whole_number(1, MAX_POSITIONS)]
Vocabulary = Annotated[int, whole_number(1, MAX_VOCABULARY)]
Pixels = Annotated[int, whole_number(1, MAX_IMAGE_SIZE)]
Epsilon = Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=1), needs("a number from 0 to 1")]

_KNOWN_FIELDS = ConfigDict(extra="forbid")


def check_heads(width: int, heads: int) -> None:
    """Refuse a number of heads that does not divide the width.

    Raises:
        ValueError: It does not.
    """
    if width % heads:
        raise ValueError(f"a width of {width} cannot be shared by {heads} heads")


@dataclass(frozen=True, config=_KNOWN_FIELDS)
class VisionConfig:
    """The sizes of the vision transformer; the published one is CLIP's ViT-L/14 without its last block.

    Args:
        image_size: Edge of the square input, in pixels.
        patch_size: Edge of a patch, in pixels.
        width: Width of a token.
        layers: Number of blocks.
        heads: Heads of every attention.
        feed_forward_width: Width of the hidden layer in each block.
        layer_norm_eps: Epsilon of every layer norm.
    """

    image_size: Pixels = 224
    patch_size: Pixels = 14
    width: Width = 1024
    layers: Layers = 23
    heads: Heads = 16
    feed_forward_width: Width = 4096
    layer_norm_eps: Epsilon = 1e-5

    @model_validator(mode="after")
    def _check_shares(self) -> VisionConfig:
        check_heads(self.width, self.heads)
        if self.image_size < self.patch_size:
            raise ValueError(f"an image of {self.image_size} pixels has no patch of {self.patch_size}")
        return self

    @property
    def tokens(self) -> int:
        """Number of tokens of an image: the class token and one for each patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, config=_KNOWN_FIELDS)
class QFormerConfig:
    """The sizes of the Q-Former; the published one is BERT-base with 16 learned queries.

    Args:
        width: Width of a query and of a text token.
        layers: Number of layers.
        heads: Heads of every attention.
        feed_forward_width: Width of the hidden layer in each feed-forward layer.
        query_tokens: Number of queries.
        cross_attention_frequency: Every how many layers the queries attend to the image, beginning with the first.
        vocabulary_size: Number of text tokens, ``[DEC]`` included.
        text_positions: The most text tokens that have a position.
        layer_norm_eps: Epsilon of every layer norm.
    """

    width: Width = 768
    layers: Layers = 12
    heads: Heads = 12
    feed_forward_width: Width = 3072
    query_tokens: Positions = 16
    cross_attention_frequency: Layers = 1
    vocabulary_size: Vocabulary = 30523
    text_positions: Positions = 512
    layer_norm_eps: Epsilon = 1e-12

    @model_validator(mode="after")
    def _check_shares(self) -> QFormerConfig:
        check_heads(self.width, self.heads)
        return self


@dataclass(frozen=True, config=_KNOWN_FIELDS)
class SubjectEncoderConfig:
    """All sizes of a :class:`~blip_qformer.encoder.SubjectEncoder`.

    Args:
        vision: The vision transformer.
        qformer: The Q-Former.
        projection_width: Width of the hidden layer in the projection.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    projection_width: Width = 3072

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers in nested dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "The configuration") -> SubjectEncoderConfig:
        """Build a configuration from the result of :meth:`to_dict`.

        Args:
            values: Plain values of any origin.
            source: Where they stand, as the subject of the error's sentence.

        Raises:
            ValueError: A field is missing or unknown, of another type, or out of bounds.
        """
        return validate(cls, values, source)

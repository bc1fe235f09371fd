"""The sizes of a subject encoder. The defaults are the published model's (arXiv 2305.14720, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
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

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 23
    heads: int = 16
    feed_forward_width: int = 4096
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Number of tokens of an image: the class token and one for each patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
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

    width: int = 768
    layers: int = 12
    heads: int = 12
    feed_forward_width: int = 3072
    query_tokens: int = 16
    cross_attention_frequency: int = 1
    vocabulary_size: int = 30523
    text_positions: int = 512
    layer_norm_eps: float = 1e-12


@dataclass(frozen=True)
class SubjectEncoderConfig:
    """All sizes of a :class:`~blip_qformer.encoder.SubjectEncoder`.

    Args:
        vision: The vision transformer.
        qformer: The Q-Former.
        projection_width: Width of the hidden layer in the projection.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    projection_width: int = 3072

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers in nested dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SubjectEncoderConfig:
        """Build a configuration from the result of :meth:`to_dict`.

        Raises:
            KeyError: ``vision``, ``qformer`` or ``projection_width`` is missing.
            TypeError: A field is unknown.
        """
        return cls(
            vision=VisionConfig(**values["vision"]),
            qformer=QFormerConfig(**values["qformer"]),
            projection_width=values["projection_width"],
        )

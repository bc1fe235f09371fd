"""The sizes of a subject encoder. The defaults are the published model's (REFERENCE: arXiv 2305.14720, section 3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer; the published one is ViT-L/14 without its last block."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 23
    heads: int = 16
    feed_forward_width: int = 4096
    layer_norm_eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Tokens a picture becomes: one for each patch, and the class token in front."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class QFormerConfig:
    """A BERT with learned queries that look at a picture; the published one is BERT-base with 16 queries."""

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
    """Everything needed to build a :class:`~blip_qformer.encoder.SubjectEncoder`."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    projection_width: int = 3072

    def to_dict(self) -> dict:
        """Plain numbers, for a JSON header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> SubjectEncoderConfig:
        """The inverse of :meth:`to_dict`; raises ``TypeError`` or ``KeyError`` where a field is unknown or missing."""
        return cls(
            vision=VisionConfig(**values["vision"]),
            qformer=QFormerConfig(**values["qformer"]),
            projection_width=values["projection_width"],
        )

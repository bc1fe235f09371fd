"""Record Attention · Subject Attention Map."""

from __future__ import annotations

from torch import Tensor

from ..blip_qformer.attention.maps import AttentionRecord
from ..blip_qformer.attention.word_sheets import word_sheets
from ..blip_qformer.attention.words import parse_words
from .host.attention.lost_edits import require_kept
from .host.attention.recorder import model_for_records, record_attention, require_recorded
from .host.attention.regional_conditioning import with_region_words
from .host.conditioning import Conditioning
from .host.prompt_words import token_spans
from .types import CATEGORY, RecordedAttention, advanced, io, model_input, model_output, newer_fields


class RecordAttention(io.ComfyNode):
    """Records the attention to a conditioning while a sampler runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionAttentionRecord",
            display_name="Record Attention",
            category=CATEGORY,
            **newer_fields(["cross-attention", "attention capture", "daam"]),
            description="Stands between a prompt and KSampler and notes where each word looks while the picture is "
            "drawn. The picture stays as it is. Subject Attention Map shows what was noted.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The positive prompt, from Subject Prompt Compose."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for a prompt from CLIP Text Encode: the same clip, to tell the words apart.",
                ),
                advanced(
                    io.String.Input(
                        "text",
                        optional=True,
                        default="",
                        multiline=True,
                        tooltip="Only for a prompt from CLIP Text Encode: the same text. If Concat, Combine, "
                        "BREAK or AND made it of several: a line for each, in order.",
                    )
                ),
                model_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For KSampler's positive input."),
                RecordedAttention.Output(display_name="attention", tooltip="For Subject Attention Map."),
                model_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Conditioning,
        clip: io.Clip.Type | None = None,
        text: str = "",
        model: io.Model.Type | None = None,
    ) -> io.NodeOutput:
        """Return the conditioning that fills a record, the record, and the model that fills it without a hook."""
        require_kept(cls.hidden)
        record = AttentionRecord(with_region_words(conditioning, token_spans(conditioning, clip, text)))
        recorded = record_attention(conditioning, record, in_model=model is not None)
        return io.NodeOutput(recorded, record, model_for_records(model))


class SubjectAttentionMap(io.ComfyNode):
    """Shows a record as heatmaps over the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionAttentionMap",
            display_name="Subject Attention Map",
            category=CATEGORY,
            **newer_fields(["heatmap", "cross-attention map", "daam"]),
            description="Shows where each word of the prompt, and the subject, looked while the picture was drawn.",
            inputs=[
                RecordedAttention.Input("attention", tooltip="From Record Attention."),
                io.Image.Input(
                    "image", tooltip="What the KSampler behind that Record Attention drew, from VAE Decode. Any size."
                ),
                io.String.Input(
                    "words",
                    default="",
                    placeholder="<subject>, dog, red hat",
                    tooltip="Which words, with commas between them. <subject> is the subject itself. A word that "
                    "stands several times counts as one; dog#2 is its second occurrence alone. Empty: every word.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0: the picture alone, 1: the map alone.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="A picture for each word, the word below it. For Preview Image."
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The maps themselves in the same order: white where a word looked most.",
                ),
            ],
        )

    @classmethod
    def execute(cls, attention: AttentionRecord, image: Tensor, words: str, strength: float) -> io.NodeOutput:
        """Return a labelled image for each word, and the heatmaps."""
        require_recorded(attention, image)
        return io.NodeOutput(*word_sheets(attention, image, parse_words(words), strength))


NODES = [RecordAttention, SubjectAttentionMap]

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
            description="Notes where in the picture each word of the prompt is at work while the picture is drawn. "
            "The picture stays the same. Put it between the prompt and KSampler, and look at the notes with Subject "
            "Attention Map.",
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The positive prompt, from Subject Prompt Compose."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for a prompt from CLIP Text Encode: the same clip as there.",
                ),
                advanced(
                    io.String.Input(
                        "text",
                        optional=True,
                        default="",
                        multiline=True,
                        tooltip="Only for a prompt from CLIP Text Encode: the same text as there. If it was joined "
                        "from several texts (Concat, Combine, BREAK, AND): one line for each, in the same order.",
                    )
                ),
                model_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The same prompt. Connect it to positive of KSampler."
                ),
                RecordedAttention.Output(
                    display_name="attention", tooltip="The notes. Connect them to Subject Attention Map."
                ),
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
            description="Shows where in the picture each word of the prompt, and your subject, was at work: bright "
            "means much. Use it to find out why a word is ignored.",
            inputs=[
                RecordedAttention.Input("attention", tooltip="The notes of Record Attention."),
                io.Image.Input(
                    "image",
                    tooltip="The picture that the KSampler after Record Attention drew, from VAE Decode. Any size.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    placeholder="<subject>, dog, red hat",
                    tooltip="Which words to show, with commas between them. <subject> is your subject. A word that "
                    "stands there several times counts as one; dog#2 is the second dog alone. Empty: every word.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the map covers the picture. 0: only the picture. 1: only the map.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="A picture for each word, with the word below it. Connect it to Preview Image.",
                ),
                io.Mask.Output(
                    display_name="mask",
                    tooltip="The maps alone, in the same order: white where a word was most at work.",
                ),
            ],
        )

    @classmethod
    def execute(cls, attention: AttentionRecord, image: Tensor, words: str, strength: float) -> io.NodeOutput:
        """Return a labelled image for each word, and the heatmaps."""
        require_recorded(attention, image)
        return io.NodeOutput(*word_sheets(attention, image, parse_words(words), strength))


NODES = [RecordAttention, SubjectAttentionMap]

"""Attention Re-weight Edit · Prompt-to-Prompt Edit · Edit Mask."""

from __future__ import annotations

from ..blip_qformer.attention.prompt_to_prompt import PromptToPromptSettings
from ..blip_qformer.attention.schedule import StepRange
from ..blip_qformer.attention.words import parse_word_ranges, parse_word_weights, parse_words
from .host.attention.batching import batch_edits
from .host.attention.hooks import model_for_edits
from .host.attention.local_blend import edit_masks_of
from .host.attention.lost_edits import require_edits_kept
from .host.attention.reweight import require_single_prompt, reweight
from .host.conditioning import Conditioning
from .host.latents import Latent
from .host.prompt_words import token_spans
from .types import CATEGORY, advanced, fraction_input, io, model_input, model_output, newer_fields, text_input

WORDS_HELP = "A word that stands several times is meant everywhere; dog#2 is its second occurrence alone."


class AttentionReweight(io.ComfyNode):
    """Scales the attention to words of a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionAttentionReweight",
            display_name="Attention Re-weight Edit",
            category=CATEGORY,
            **newer_fields(["attention weight", "prompt weight", "emphasis"]),
            description="Makes words of a prompt louder, quieter or the opposite, and leaves the rest of the picture "
            "as it is. Stands between the prompt and any sampler; the negative prompt does not need it.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="From Subject Prompt Compose; or from CLIP Text Encode, with clip and text below.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    multiline=True,
                    placeholder="swimming:2.0, <subject>:0.6, red hat:-0.5",
                    tooltip="Words with weights, commas between them. 1: as it is. 2: twice as much. 0: not at all. "
                    "Below 0: the opposite. <subject> is the subject's picture. <end> is the end of the prompt, behind "
                    "its words: it carries the prompt as a whole, often the place, the light and the style, unless "
                    f"repetitions fill the prompt. {WORDS_HELP}",
                ),
                advanced(
                    fraction_input("start", 0.0, "From which part of the steps on: 0 is the beginning, 0.5 the middle.")
                ),
                advanced(
                    fraction_input(
                        "end",
                        1.0,
                        "Up to which part of the steps: 1 is the end. The first steps decide what stands where, the "
                        "last ones the details.",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for a conditioning from CLIP Text Encode: the clip it was made with.",
                ),
                text_input(
                    "text",
                    "Only for a conditioning from CLIP Text Encode: the text it was made from. "
                    "If Concat, Combine, BREAK or AND made it of several: a line for each, in order.",
                ),
                model_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="For a sampler's positive input, or ControlNet and area nodes before it.",
                ),
                model_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        conditioning: Conditioning,
        weights: str,
        start: float,
        end: float,
        clip: io.Clip.Type | None = None,
        text: str = "",
        model: io.Model.Type | None = None,
    ) -> io.NodeOutput:
        """Return the conditioning with weights on its words, and the model that samples it without a hook."""
        require_single_prompt(conditioning)
        words = token_spans(conditioning, clip, text)
        steps = StepRange(start, end)
        edited = reweight(conditioning, words, parse_word_weights(weights), steps, in_model=model is not None)
        require_edits_kept(cls.hidden, conditioning, edited)
        return io.NodeOutput(edited, model_for_edits(model))


class PromptToPromptEdit(io.ComfyNode):
    """Samples a source image and its edits side by side from the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionPromptToPrompt",
            display_name="Prompt-to-Prompt Edit",
            category=CATEGORY,
            **newer_fields(["p2p", "image editing", "swap words"]),
            description="Draws a picture and an edit of it side by side: the same arrangement, another thing, or your "
            "subject in its place. Both outputs go to the sampler; the negative prompt goes there as ever.",
            inputs=[
                io.Conditioning.Input("source", tooltip="The prompt of the picture to edit: a cat on a chair."),
                io.Conditioning.Input(
                    "edited",
                    tooltip="The prompt of the edit: a dog on a chair, or a <subject> dog on a chair. Words may be "
                    "swapped, added or left out; what both prompts share is found by itself.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An Empty Latent Image, or a picture from DDIM Inversion. Every picture of it is drawn "
                    "once for the source and once for each edit.",
                ),
                fraction_input(
                    "cross_end",
                    0.8,
                    "How long the edit keeps what stands where, as a part of the steps. Lower: the new thing finds its "
                    "own shape.",
                ),
                fraction_input(
                    "self_end",
                    0.4,
                    "How long the edit keeps outlines and layout, as a part of the steps. Lower it if the new thing "
                    "has another shape.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="red hat:2.0",
                    tooltip=f"Words of the edited prompt with weights, as in Attention Re-weight Edit. {WORDS_HELP}",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    placeholder="<subject>, dog",
                    tooltip="Words of the edited prompt, with commas between them: only where they look may the "
                    "picture change, and the background stays. Empty: it may change everywhere.",
                ),
                advanced(
                    io.String.Input(
                        "source_blend_words",
                        default="",
                        placeholder="cat",
                        tooltip="The same with words of the source prompt, such as the thing that is replaced. With "
                        "both, the picture may change where either looks.",
                    )
                ),
                advanced(
                    fraction_input(
                        "blend_threshold",
                        0.3,
                        "How strongly blend words must look at a place for it to change. Higher: a smaller area. "
                        "0: no blend.",
                    )
                ),
                advanced(fraction_input("cross_start", 0.0, "From which part of the steps on cross_end counts.")),
                advanced(fraction_input("self_start", 0.0, "From which part of the steps on self_end counts.")),
                advanced(
                    io.String.Input(
                        "word_steps",
                        default="",
                        placeholder="dog:0.5, hat:0.2-0.9",
                        tooltip="An end, or a start and an end, in place of cross_start and cross_end for single words "
                        "of the edited prompt.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "source_unguided",
                        default=False,
                        tooltip="For a photograph from DDIM Inversion: the source is drawn without the sampler's cfg, "
                        "so that it comes out as the photograph. The edits are guided as ever.",
                    )
                ),
                io.Conditioning.Input("edited_2", optional=True, tooltip="A second edit of the same picture."),
                io.Conditioning.Input("edited_3", optional=True, tooltip="A third edit of the same picture."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for conditionings from CLIP Text Encode: the clip they were made with.",
                ),
                text_input("source_text", "Only for CLIP Text Encode: the text that source was made from."),
                text_input(
                    "edited_text",
                    "Only for CLIP Text Encode: the text that edited was made from. With edited_2 and "
                    "edited_3, a line for each.",
                ),
                model_input(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For the sampler's positive input."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="For the sampler's latent_image: the source, then each edit, all with the same noise.",
                ),
                model_output(),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        source: Conditioning,
        edited: Conditioning,
        latent: Latent,
        cross_end: float,
        self_end: float,
        weights: str,
        blend_words: str,
        source_blend_words: str,
        blend_threshold: float,
        cross_start: float,
        self_start: float,
        word_steps: str,
        source_unguided: bool,
        edited_2: Conditioning | None = None,
        edited_3: Conditioning | None = None,
        clip: io.Clip.Type | None = None,
        source_text: str = "",
        edited_text: str = "",
        model: io.Model.Type | None = None,
    ) -> io.NodeOutput:
        """Return one conditioning for source and edits, the latent repeated for them, and the model that edits it."""
        settings = PromptToPromptSettings(
            cross_steps=StepRange(cross_start, cross_end),
            self_steps=StepRange(self_start, self_end),
            weights=parse_word_weights(weights),
            word_steps=parse_word_ranges(word_steps),
            blend_words=parse_words(blend_words),
            source_blend_words=parse_words(source_blend_words),
            threshold=blend_threshold,
            source_unguided=source_unguided,
        )
        others = [each for each in (edited, edited_2, edited_3) if each is not None]
        in_model = model is not None
        conditioning, repeated = batch_edits(
            source, others, latent, settings, clip, source_text, edited_text, in_model=in_model
        )
        require_edits_kept(cls.hidden, source, conditioning)
        return io.NodeOutput(conditioning, repeated, model_for_edits(model))


class EditMask(io.ComfyNode):
    """Shows the masks of local blend."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionEditMask",
            display_name="Edit Mask",
            category=CATEGORY,
            **newer_fields(["local blend mask", "p2p mask"]),
            description="Shows where Prompt-to-Prompt Edit let the picture change, if it had blend words.",
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="What the sampler drew from Prompt-to-Prompt Edit's outputs, directly from the sampler.",
                )
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask",
                    tooltip="A mask for each edit, as large as the picture: white where it could change. For "
                    "MaskPreview, or for compositing.",
                )
            ],
        )

    @classmethod
    def execute(cls, latent: Latent) -> io.NodeOutput:
        """Return a mask for each edited image."""
        return io.NodeOutput(edit_masks_of(latent))


NODES = [AttentionReweight, PromptToPromptEdit, EditMask]

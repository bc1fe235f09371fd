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

WORDS_HELP = "A word that stands there several times is meant everywhere; dog#2 is the second dog alone."


class AttentionReweight(io.ComfyNode):
    """Scales the attention to words of a prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and texts of the node."""
        return io.Schema(
            node_id="BLIPDiffusionAttentionReweight",
            display_name="Attention Re-weight Edit",
            category=CATEGORY,
            **newer_fields(["attention weight", "prompt weight", "emphasis", "word weight"]),
            description="Makes single words of a prompt stronger or weaker, and leaves the rest of the picture as it "
            "is: more snow, no hat, less of the subject. Put it between the prompt and the sampler. The negative "
            "prompt does not need it.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt, from Subject Prompt Compose. A prompt from CLIP Text Encode works too; then "
                    "fill in clip and text.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    multiline=True,
                    placeholder="swimming:2.0, <subject>:0.6, red hat:-0.5",
                    tooltip="Words and numbers, with commas between them: swimming:2.0, red hat:0.5. 1: no change. "
                    "2: twice as strong. 0: the word is ignored. Below 0: the opposite. <subject> is your subject. "
                    "<end> is the end of the prompt, which often carries the place, the light and the style; it "
                    f"needs a prompt that is said only a few times. {WORDS_HELP}",
                ),
                advanced(
                    fraction_input(
                        "start",
                        0.0,
                        "When it begins. 0: at the first step. 0.5: in the middle. Late steps change only details.",
                    )
                ),
                advanced(
                    fraction_input(
                        "end",
                        1.0,
                        "When it stops. 1: at the last step. 0.5: in the middle. The first steps decide where things "
                        "are, the last steps decide the details.",
                    )
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for a prompt from CLIP Text Encode: the same clip as there.",
                ),
                text_input(
                    "text",
                    "Only for a prompt from CLIP Text Encode: the same text as there. If it was joined from several "
                    "texts (Concat, Combine, BREAK, AND): one line for each, in the same order.",
                ),
                model_input(),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="The changed prompt. Connect it to positive of the sampler, or to ControlNet and area "
                    "nodes before it.",
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
            **newer_fields(["p2p", "prompt to prompt", "image editing", "swap words", "replace object"]),
            description="Draws a picture and a changed version of it side by side: the same arrangement, with another "
            "thing in it, or with your subject. Connect conditioning and latent to the sampler. To change a "
            "photograph, put DDIM Inversion before it.",
            inputs=[
                io.Conditioning.Input("source", tooltip="The prompt of the picture as it is: a cat on a chair."),
                io.Conditioning.Input(
                    "edited",
                    tooltip="The prompt of the changed picture: a dog on a chair. Or with your subject, from Subject "
                    "Prompt Compose. You may swap words, add words or leave words out.",
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="An Empty Latent Image, or a photograph from DDIM Inversion. Each picture in it is drawn "
                    "once as it is and once for every change.",
                ),
                fraction_input(
                    "cross_end",
                    0.8,
                    "How long the change keeps things where they are. 0.8: in the first 80 % of the steps. Lower it "
                    "if the new thing needs a shape of its own.",
                ),
                fraction_input(
                    "self_end",
                    0.4,
                    "How long the change keeps outlines and layout. 0.4: in the first 40 % of the steps. Lower it to "
                    "0.2 or less if the new thing has another shape.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    placeholder="red hat:2.0",
                    tooltip="Makes words of the edited prompt stronger or weaker: red hat:2.0. 1 is no change. "
                    f"{WORDS_HELP}",
                ),
                io.String.Input(
                    "blend_words",
                    default="",
                    placeholder="<subject>, dog",
                    tooltip="Keeps the background. Write the new thing here, in words of the edited prompt with "
                    "commas between them, and the picture changes only there. Empty: it may change everywhere.",
                ),
                advanced(
                    io.String.Input(
                        "source_blend_words",
                        default="",
                        placeholder="cat",
                        tooltip="Write here the thing that is replaced, in words of the source prompt. The picture "
                        "may then change there too.",
                    )
                ),
                advanced(
                    fraction_input(
                        "blend_threshold",
                        0.3,
                        "How large the area of the blend words is. Higher: smaller. Lower: larger. 0: the whole "
                        "picture may change.",
                    )
                ),
                advanced(
                    fraction_input(
                        "cross_start",
                        0.0,
                        "When cross_end begins to count. 0: at the first step. It is seldom changed.",
                    )
                ),
                advanced(
                    fraction_input(
                        "self_start", 0.0, "When self_end begins to count. 0: at the first step. It is seldom changed."
                    )
                ),
                advanced(
                    io.String.Input(
                        "word_steps",
                        default="",
                        placeholder="dog:0.5, hat:0.2-0.9",
                        tooltip="A time of their own for single words of the edited prompt, instead of cross_start "
                        "and cross_end. dog:0.5 ends in the middle of the steps; hat:0.2-0.9 begins at 0.2 and ends "
                        "at 0.9.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "source_unguided",
                        default=False,
                        tooltip="Switch it on for a photograph from DDIM Inversion. Then the first picture comes out "
                        "as your photograph. The changes still follow cfg.",
                    )
                ),
                io.Conditioning.Input("edited_2", optional=True, tooltip="A second change of the same picture."),
                io.Conditioning.Input("edited_3", optional=True, tooltip="A third change of the same picture."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for prompts from CLIP Text Encode: the same clip as there.",
                ),
                text_input("source_text", "Only for CLIP Text Encode: the text of source."),
                text_input(
                    "edited_text",
                    "Only for CLIP Text Encode: the text of edited. With edited_2 and edited_3, one line for each.",
                ),
                model_input(),
                advanced(
                    io.Boolean.Input(
                        "blend_regions",
                        optional=True,
                        default=False,
                        tooltip="For edited from Subject Regions. On: only the inside of its boxes and masks "
                        "changes. The rest stays as in source, such as your photograph.",
                    )
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="Connect it to positive of the sampler."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Connect it to latent_image of the sampler. The result has the picture as it is first, "
                    "then each change.",
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
        blend_regions: bool = False,
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
            blend_regions=blend_regions,
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
            **newer_fields(["local blend mask", "change mask"]),
            description="Shows where Prompt-to-Prompt Edit let the picture change, with blend_words or blend_regions.",
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="The result of the sampler that Prompt-to-Prompt Edit is connected to. Connect it "
                    "directly, with no node between.",
                )
            ],
            outputs=[
                io.Mask.Output(
                    display_name="mask",
                    tooltip="One mask for each change, as large as the picture. White: it could change there. Look at "
                    "it in a mask preview, or use it to put pictures together.",
                )
            ],
        )

    @classmethod
    def execute(cls, latent: Latent) -> io.NodeOutput:
        """Return a mask for each edited image."""
        return io.NodeOutput(edit_masks_of(latent))


NODES = [AttentionReweight, PromptToPromptEdit, EditMask]

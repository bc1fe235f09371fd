"""DDIM Inversion."""

from __future__ import annotations

from .host.conditioning import Conditioning
from .host.inversion import invert_latent, sampler_settings
from .host.latents import Latent
from .types import CATEGORY, advanced, io, newer_fields


class DDIMInversion(io.ComfyNode):
    """Finds the latent from which stock DDIM sampling reproduces an image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare inputs, outputs and their help."""
        return io.Schema(
            node_id="BLIPDiffusionDDIMInversion",
            display_name="DDIM Inversion",
            category=CATEGORY,
            **newer_fields(["invert image", "unsampler", "photo editing", "edit photo"]),
            description="Finds the noise that your own photograph could have been drawn from. KSampler (Advanced) "
            "then draws the photograph again, or a changed version of it with another prompt. Set the KSampler "
            "(Advanced) as the output named settings says.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will draw the picture later. SD1.5 and SDXL work; Flux does not."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="A prompt that describes your picture. If you draw with a ControlNet later, apply it to "
                    "this prompt too.",
                ),
                io.Latent.Input("latent", tooltip="Your picture, from VAE Encode. A batch of pictures works too."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="The same number as in the KSampler (Advanced) that draws later. More steps come closer "
                    "to your picture and take longer.",
                ),
                advanced(
                    io.Int.Input(
                        "refinements",
                        default=1,
                        min=0,
                        max=20,
                        tooltip="How many times each step is corrected. More comes closer to your picture. Each "
                        "correction takes as long as the whole work without any. 0: none, the plain DDIM inversion.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="The noise. Connect it to latent_image of KSampler (Advanced) with add_noise on disable, "
                    "or to Prompt-to-Prompt Edit.",
                ),
                io.String.Output(
                    display_name="settings",
                    tooltip="Text to read: how to set the KSampler (Advanced) that draws your picture again.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        conditioning: Conditioning,
        latent: Latent,
        steps: int,
        refinements: int,
    ) -> io.NodeOutput:
        """Invert the latent."""
        inverted = invert_latent(model, conditioning, latent, steps, refinements)
        return io.NodeOutput(inverted, sampler_settings(steps))


NODES = [DDIMInversion]

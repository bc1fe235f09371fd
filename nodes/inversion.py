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
            **newer_fields(["invert image", "unsampler", "photo editing"]),
            description="Finds the noise that a picture of yours could have been drawn from. KSampler (Advanced), set "
            "as the output settings says, draws the picture again from it, or with another prompt an edit of it.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model that will draw from the latent. SD1.5 and SDXL work, Flux not."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="A prompt that describes the picture, with its ControlNet if the drawing will have one.",
                ),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. A batch is inverted row by row."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="The same number as in the KSampler (Advanced) that draws from the latent. More steps find "
                    "the picture more exactly.",
                ),
                advanced(
                    io.Int.Input(
                        "refinements",
                        default=1,
                        min=0,
                        max=20,
                        tooltip="How often each step is corrected, so that drawing comes back to the picture more "
                        "exactly. Each correction takes as long as the inversion without any; 0 is plain DDIM "
                        "inversion.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent", tooltip="For KSampler (Advanced), which must not add noise to it."
                ),
                io.String.Output(
                    display_name="settings", tooltip="How to set the KSampler (Advanced) that finds the picture again."
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

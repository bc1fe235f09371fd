"""Initial weights of the small model, which is trained from nothing."""

from blip_qformer.pipeline import Pipeline

from .colour_vae import initialise_vae
from .patch_positions import initialise_patch_positions

__all__ = ["initialise"]


def initialise(pipeline: Pipeline) -> None:
    """Initialise a new small model beyond its random weights, in place; an ``initialise`` of ``new_pipeline``.

    The image encoder's position embeddings become waves of row and column, and the VAE passes colours through.

    Args:
        pipeline: The new model.
    """
    initialise_patch_positions(pipeline.encoder.vision.position_embedding)
    initialise_vae(pipeline.vae)

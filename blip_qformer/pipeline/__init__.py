"""A whole BLIP-Diffusion model on diffusers: load, save, sample, fine-tune."""

from .new import new_pipeline
from .pipeline import SCHEDULER_CONFIG, Pipeline, load_pipeline, replace_network
from .save import save_pipeline

__all__ = ["SCHEDULER_CONFIG", "Pipeline", "load_pipeline", "new_pipeline", "replace_network", "save_pipeline"]

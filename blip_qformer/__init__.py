"""BLIP-Diffusion as a library: subject encoder, prompts, attention edits and training, without ComfyUI.

>>> from blip_qformer import load_subject_encoder
>>> from blip_qformer.encoder import preprocess
>>> encoder = load_subject_encoder("models/blip_diffusion/blipdiffusion")
>>> vectors = encoder(preprocess(images), ["dog"])  # [1, 16, 768]
"""

from .checkpoint import load_subject_encoder
from .subject import Subject
from .version import read_version

__all__ = ["Subject", "__version__", "load_subject_encoder"]

__version__ = read_version()

"""BLIP-Diffusion's subject encoder and all that belongs to it, without ComfyUI.

>>> from blip_qformer import load_subject_encoder
>>> from blip_qformer.encoder import preprocess
>>> encoder = load_subject_encoder("models/blip_diffusion/blipdiffusion")
>>> vectors = encoder(preprocess(images), ["dog"])  # [1, 16, 768]
"""

from .checkpoint import load_subject_encoder
from .subject import Subject

__all__ = ["Subject", "load_subject_encoder"]

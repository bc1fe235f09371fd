"""BLIP-Diffusion's subject encoder: an image and a word -> 16 vectors of a prompt."""

from .config import QFormerConfig, SubjectEncoderConfig, VisionConfig
from .model import SubjectEncoder
from .preprocessing import PREPROCESSING_MODES, fit_mask, isolate_subject, preprocess
from .tokenizer import tokenize_subjects

__all__ = [
    "PREPROCESSING_MODES",
    "QFormerConfig",
    "SubjectEncoder",
    "SubjectEncoderConfig",
    "VisionConfig",
    "fit_mask",
    "isolate_subject",
    "preprocess",
    "tokenize_subjects",
]

"""Picture and word -> 16 vectors."""

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

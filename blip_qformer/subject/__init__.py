"""Subjects: the vectors that stand for a thing in a prompt, their blends and their files."""

from .blending import BLEND_MODES, blend, trajectory
from .file import load_subject, save_subject
from .subject import Subject

__all__ = ["BLEND_MODES", "Subject", "blend", "load_subject", "save_subject", "trajectory"]

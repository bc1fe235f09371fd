"""Evaluation: how well a model draws the subject it was shown, where it was asked to."""

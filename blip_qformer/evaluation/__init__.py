"""Evaluation: how sure a measured share or mean is."""

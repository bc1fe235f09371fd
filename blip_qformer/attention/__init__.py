"""Attention edits as functions on tensors: re-weighted words, prompt-to-prompt, local blend, regions, maps."""

"""Attention edits as functions on tensors: re-weighted words, prompt-to-prompt in closed form, local blend, maps."""

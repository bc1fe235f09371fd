"""Editing attention: re-weighted words, prompt-to-prompt in closed form, local blend."""

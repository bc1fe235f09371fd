"""Edited and recorded attention inside the sampler of ComfyUI."""

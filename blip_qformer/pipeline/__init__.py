"""A whole BLIP-Diffusion model on diffusers: load, save, sample, fine-tune."""

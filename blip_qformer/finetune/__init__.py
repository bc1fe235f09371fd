"""Fine-tuning on one subject (arXiv 2305.14720, section 4), independent of ComfyUI and of diffusers."""

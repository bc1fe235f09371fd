"""The noise schedule, DDIM and DDIM inversion, in torch alone: fine-tuning runs where diffusers is not installed."""

"""The noise schedule, DDIM and DDIM inversion, in torch alone."""

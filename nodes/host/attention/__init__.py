"""Attention in ComfyUI's samplers, edited or recorded; :mod:`.hooks` tells the way from an edit node to the U-Net."""

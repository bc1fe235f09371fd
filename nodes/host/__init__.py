"""The adapter between ComfyUI and the library: all that imports comfy."""

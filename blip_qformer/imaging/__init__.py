"""Images as tensors: masks, matting, segmentation, compositing, contact sheets."""

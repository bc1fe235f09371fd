"""Images: matting, segmentation, compositing, contact sheets."""

"""The small world and the small model trained in it."""

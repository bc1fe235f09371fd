"""The published layouts of a checkpoint."""

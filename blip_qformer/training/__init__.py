"""Training: settings of a run, the loop, checkpoints, losses, and the paper's two stages."""

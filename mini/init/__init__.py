"""Initial weights for models trained from nothing."""

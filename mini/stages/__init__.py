"""Training stages that only a model trained from nothing needs."""

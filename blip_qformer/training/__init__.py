"""Training: the three stages, their data, and the small world they are proven in."""

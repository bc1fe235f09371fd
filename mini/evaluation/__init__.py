"""What the small model is worth."""

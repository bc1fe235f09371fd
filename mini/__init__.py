"""The small world and the small model made in it."""

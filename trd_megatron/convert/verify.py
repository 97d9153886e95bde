"""Comparing two checkpoints, of either format."""

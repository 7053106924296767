"""Loads watched, placements renewed, weights moved, while the model runs."""

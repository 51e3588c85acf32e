"""Batches by Poisson sampling, and the loaders that give them."""

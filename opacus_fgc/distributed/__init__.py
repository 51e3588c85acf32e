"""A model and its batches over several processes."""

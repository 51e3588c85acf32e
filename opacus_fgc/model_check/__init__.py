"""`check`: a user's own model, layer by layer, against plain autograd on one sample at a time."""

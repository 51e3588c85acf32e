"""One step: the norm pass, the weighted pass, and the clipped sum that they leave."""

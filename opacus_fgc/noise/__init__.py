"""Random numbers for noise and sampling."""

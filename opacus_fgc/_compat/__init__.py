"""Private names of torch (2.6 to 2.15) and Opacus (1.6): the one place that uses them, each held by a test of its own name."""

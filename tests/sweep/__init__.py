"""Every class of the installed transformers for some tasks, tiny and unpatched, against the oracle; see `docs/sweep.md`."""

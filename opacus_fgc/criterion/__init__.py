"""Criteria: one loss a sample from any of them, or an error."""

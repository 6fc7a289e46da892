"""Builds the parity sheets of {{SLUG}}, `parity/*.json`: what the official code computes for weights that are filled by a rule."""

"""Runs, comparisons and sweeps as Python objects, for scripts and notebooks."""

"""Logs, progress bars, tables, plots and the report of a run.

These modules know plain values only: mappings of names to numbers and
strings. They import no jax. Heavy libraries (matplotlib, tensorboardX, Jinja2,
tqdm) are loaded on first use.
"""

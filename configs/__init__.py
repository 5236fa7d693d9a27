"""Configs: each changes a few keys of default.py."""

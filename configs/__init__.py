"""Config files: each one changes a few keys of default.py."""

"""Sweeps, which need optuna (pip install 'vaecf[tune]'), and populations."""

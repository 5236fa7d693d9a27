"""Search for hyper-parameters, and populations.

A sweep needs optuna: pip install 'vaecf[tune]'.
"""

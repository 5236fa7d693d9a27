"""Search for hyper-parameters. Needs optuna: pip install 'vaecf[tune]'."""

"""Search spaces of sweeps: each file has a get_space()."""

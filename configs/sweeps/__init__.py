"""Search spaces of sweeps: each has a get_space()."""

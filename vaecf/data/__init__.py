"""What we learn from: ratings, splits and the dataset on disk. No jax here."""

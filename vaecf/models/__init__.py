"""What we learn: pure functions over parameters, Flax linen modules."""

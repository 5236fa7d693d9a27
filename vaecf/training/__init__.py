"""How we learn."""

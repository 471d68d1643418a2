"""How a GPU gets access to a mapped file."""

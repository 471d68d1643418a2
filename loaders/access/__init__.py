"""How a GPU is given access to a mapped file."""

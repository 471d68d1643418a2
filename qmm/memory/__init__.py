"""Where an engine's weights lie, and which GPU there is to read them."""

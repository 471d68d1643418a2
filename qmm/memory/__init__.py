"""The placement of an engine's weights, and the choice of its GPU."""

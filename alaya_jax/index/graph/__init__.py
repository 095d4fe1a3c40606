"""The graph index of a stored context: spec, layer, build, search."""

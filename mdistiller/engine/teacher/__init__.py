"""A frozen network, in less time."""

"""Running many experiments, reading them back, and their tables."""

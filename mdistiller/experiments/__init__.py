"""Run many experiments, read their results back, and put them into tables."""

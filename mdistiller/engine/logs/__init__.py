"""Where the figures of a run are written; one writer a file."""

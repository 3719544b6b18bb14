"""Durable files: atomic writes, checksums, locks."""

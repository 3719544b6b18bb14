"""Durable files: whole or not there, checked, locked."""

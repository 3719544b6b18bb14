"""Matplotlib figures; none needs a display."""

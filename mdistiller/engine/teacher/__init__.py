"""Faster evaluation of the frozen teacher."""

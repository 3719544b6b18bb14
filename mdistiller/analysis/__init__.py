"""Analyse runs and trained networks: metrics, plots, HTML reports."""

"""Reading what runs have written: figures, tables, curves."""

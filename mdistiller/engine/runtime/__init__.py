"""The process: device, seeds, signals, memory, and the record of its environment."""

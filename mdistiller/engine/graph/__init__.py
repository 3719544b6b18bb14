"""A function of tensors as one CUDA graph: recording it, and what shows that it cannot be recorded."""

"""Training on a GPU, rehearsed without one: `_fake_gpu.py` is the GPU, `places.py` says where the host waits for it."""

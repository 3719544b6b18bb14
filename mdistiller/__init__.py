"""Knowledge distillation in PyTorch: a faithful fork of MDistiller that carries DCGD."""

__version__ = "0.1.0"

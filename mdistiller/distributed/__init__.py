"""Several processes: ranks, a batch gathered over them, BatchNorm over them. Nobody else asks torch.distributed."""

"""Training in several processes: ranks, gathered batches, synchronised BatchNorm; all use of torch.distributed."""

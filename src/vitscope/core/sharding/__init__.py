"""Models whose weights are sharded over ranks (PyTorch's ``fully_shard``)."""

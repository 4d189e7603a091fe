"""A network as ONNX and torch.export files, one per block, and the runner that needs no torch."""

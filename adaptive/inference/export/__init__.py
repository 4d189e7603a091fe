"""Export: a network as ONNX and torch.export files, one per block, and the runner of the former without torch."""

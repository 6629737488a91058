"""What computes a model: PyTorch, the sparse runtime, or onnxruntime, and the choice between them."""

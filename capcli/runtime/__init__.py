"""Sparse weights on a CPU: packing, kernels in numba, the encoder, and the model that runs on them."""

"""The only boundary to transformers: loading, computing, storing models."""

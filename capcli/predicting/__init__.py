"""What a model answers to texts without labels."""

"""What the project exists for: which weights stay, and what the rest are trained with."""

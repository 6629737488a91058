"""Where models and data come from: the hub, local folders, and what is never read."""

"""A sweep of `cap prune`: runs in processes of their own, one result."""

"""From files to batches: layout, tables, labels, tasks, tokens."""

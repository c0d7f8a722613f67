"""What one process does with checkpoints of any layout: look at, verify, compare, average."""

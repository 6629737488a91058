"""Results as typed records, without torch: what each command writes, and the one way to JSON and back."""

"""Training with masks: tasks, examples, and the methods that search for masks."""

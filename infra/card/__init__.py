"""Describe the shards of a finished run for those who read them: a Hugging Face dataset card and a Croissant file."""

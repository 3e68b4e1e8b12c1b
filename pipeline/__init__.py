"""Uncurated images -> curated WebDataset shards. Start at `pipeline.graph`."""

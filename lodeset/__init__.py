"""From a pile of uncurated images to a pretrained, pruned vision model, as one DAG."""

"""The sample world: drawn images with a known truth, for the demonstration run and for end-to-end tests."""

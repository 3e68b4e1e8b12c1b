"""The DAG: what a stage is (`stage`, `fingerprint`), where its results lie (`store`), how it is run (`runner`, `child`)."""

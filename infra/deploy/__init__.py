"""Files for clusters: Kubernetes manifests and configurations of Ray's cluster launcher."""

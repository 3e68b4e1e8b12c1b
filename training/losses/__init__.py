"""Loss terms of DINOv2 as pure functions, and the Sinkhorn-Knopp centring of the teacher's scores."""

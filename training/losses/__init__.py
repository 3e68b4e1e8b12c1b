"""Loss terms of DINOv2 as pure functions, and the Sinkhorn-Knopp centering of the teacher's scores."""

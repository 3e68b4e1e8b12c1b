"""Self-supervised pretraining (DINOv2) on the shards that `pipeline` writes: shards in, checkpoints out.

Start with `ssl.py` (one step of the method), then read `loop.py` (a run) and `launch.py` (a run on many processes).
"""

"""A BERT encoder library: own attention core, packed batches, weights from public checkpoints.

Nothing here knows of HTTP or asyncio. `Encoder.from_folder` loads a checkpoint, `make_runner` decides how
this machine runs it, and a `Runner` maps a list of `Tokens` to float32 arrays.
"""

"""Other systems' interfaces, thin: what they hand over is mapped to physical experts, and nothing else.

`megatron` is for token dispatchers that take a routing map, `engines` for inference engines that hold ``topk_ids``.
Neither imports the system that it is for.
"""

"""``plan``: whether a checkpoint's engine fits on GPUs, how much is left, and what the nearest engine is that does.

Only ``config.json`` and the shards' headers are read. ``footprint.py`` adds up weights and KV cache, ``activations.py``
what a call needs, ``gpus.py`` says what there is; ``nearest.py`` looks for what would fit.

Engines use one GPU today. What is said of several is arithmetic: attention and dense matrices cut evenly, each GPU with
its own whole experts, norms and routers on every GPU.
"""

from shuntyard.engines.plan.answer import Plan, plan
from shuntyard.engines.plan.budget import Request, parse_tokens

__all__ = ["Plan", "Request", "parse_tokens", "plan"]

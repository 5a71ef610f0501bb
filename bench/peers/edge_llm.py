"""NVIDIA TensorRT Edge-LLM's ``tensorrt-edgellm-export``."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    sys.argv = ["tensorrt-edgellm-export", *sys.argv[1:3]]
    runpy.run_module("tensorrt_edgellm.scripts.export", run_name="__main__")

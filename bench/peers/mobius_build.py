"""ONNX Runtime's mobius, ``mobius build``, of a local directory, in its default fp32."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    checkpoint, out = sys.argv[1:3]
    sys.argv = ["mobius", "build", "--config", checkpoint, out]
    runpy.run_module("mobius", run_name="__main__")

"""onnxruntime-genai's model builder, fp32 for the CPU."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    checkpoint, out = sys.argv[1:3]
    sys.argv = ["builder", "-i", checkpoint, "-o", out, "-p", "fp32", "-e", "cpu", "-c", f"{out}.cache"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")

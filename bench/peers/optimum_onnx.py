"""``optimum-cli export onnx``."""

from __future__ import annotations

import runpy
import sys

if __name__ == "__main__":
    checkpoint, out = sys.argv[1:3]
    sys.argv = ["optimum-cli", "export", "onnx", "--model", checkpoint, "--task", "text-generation", out]
    runpy.run_module("optimum.commands.optimum_cli", run_name="__main__")

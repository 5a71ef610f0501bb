"""transformers' own exporter, ``OnnxExporter``, of the text model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    checkpoint, out = sys.argv[1:3]
    if "--real-rope" in sys.argv:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from bench.peers.real_rope import patch

        patch()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    inputs = {"input_ids": torch.zeros((2, 32), dtype=torch.int64)}
    exporter = importlib.import_module("transformers.exporters.exporter_onnx")
    exporter.OnnxExporter().export(model, inputs, config=exporter.OnnxConfig(dynamic=True)).save_pretrained(out)

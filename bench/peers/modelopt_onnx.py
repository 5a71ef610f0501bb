"""NVIDIA ModelOpt's way to ONNX, ``get_onnx_bytes_and_metadata``, with torch's newer exporter, without a cache.

Its other one, ``llm_to_onnx``, moves its inputs to a GPU.
"""

from __future__ import annotations

import importlib
import sys

import torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    checkpoint, out = sys.argv[1:3]
    deploy = importlib.import_module("modelopt.torch._deploy.utils")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.config.use_cache = False
    inputs = (torch.zeros((2, 32), dtype=torch.int64),)
    data, _ = deploy.get_onnx_bytes_and_metadata(model, inputs, dynamo_export=True)
    deploy.OnnxBytes.from_bytes(data).write_to_disk(out)

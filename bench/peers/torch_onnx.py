"""``torch.onnx.export`` of transformers' text model, batch and length dynamic, without a cache."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    checkpoint, out = Path(sys.argv[1]), Path(sys.argv[2])
    if "--real-rope" in sys.argv:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from bench.peers.real_rope import patch

        patch()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model,
        kwargs={"input_ids": torch.zeros((2, 32), dtype=torch.int64), "use_cache": False},
        dynamic_shapes={"input_ids": {0: dynamic, 1: dynamic}, "use_cache": None},
        dynamo=True,
    )
    assert program is not None
    out.mkdir(parents=True)
    program.save(str(out / "model.onnx"), external_data=True)

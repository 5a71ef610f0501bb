"""Others that might export Llama 4 to ONNX: a file each, run as ``python FILE CHECKPOINT OUT`` in an environment each.

Every file asks for what its tool's documentation says: an ONNX model of the checkpoint at ``CHECKPOINT`` under ``OUT``,
in fp32 on the CPU where there is a choice. Versions are pinned; ``environments.py`` installs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Peer:
    """A contender: its file and arguments, and what its environment needs beside ours.

    ``telling`` finds what its log says, aside, about an export that is wrong.
    """

    name: str
    file: str
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    telling: str = ""

    @property
    def environment(self) -> str:
        """The folder of its environment; peers that need no package run in ours."""
        return Path(self.file).stem

    def command(self, python: Path, checkpoint: Path, out: Path) -> list[str]:
        """What is run."""
        return [str(python), str(HERE / self.file), str(checkpoint), str(out), *self.arguments]


# transformers 4 and 5.14 accept no newer tokenizers; httpx, requests and certifi come with the older huggingface_hub.
_OLDER_HUB = ("tokenizers==0.22.2", "certifi", "httpcore<2", "httpx<1")

PEERS = (
    Peer("torch.onnx.export", "torch_onnx.py"),
    Peer("torch.onnx.export, real-valued RoPE", "torch_onnx.py", ("--real-rope",)),
    Peer("transformers OnnxExporter", "transformers_exporter.py"),
    Peer("transformers OnnxExporter, real-valued RoPE", "transformers_exporter.py", ("--real-rope",)),
    Peer(
        "optimum-onnx",
        "optimum_onnx.py",
        packages=(
            "optimum-onnx==0.1.0",
            "optimum==2.1.0",
            "transformers==4.57.6",
            "huggingface_hub<1",
            "tokenizers==0.22.2",
            "certifi",
            "charset_normalizer",
            "requests",
            "urllib3",
        ),
    ),
    Peer("onnxruntime-genai", "genai_builder.py", packages=("onnxruntime-genai==0.18.0",)),
    Peer(
        "ModelOpt",
        "modelopt_onnx.py",
        packages=(
            "nvidia-modelopt==0.47.0",
            "transformers==5.14.1",
            "huggingface_hub<2",
            *_OLDER_HUB,
            "antlr4-python3-runtime==4.9.3",
            "charset_normalizer",
            "cppimport",
            "lief",
            "mako",
            "nvidia-ml-py",
            "omegaconf",
            "onnx==1.21.*",
            "onnx-graphsurgeon",
            "onnxconverter-common==1.16.*",
            "onnxslim",
            "polygraphy",
            "pulp<4",
            "pybind11",
            "requests",
            "scipy",
            "urllib3",
        ),
    ),
    Peer(
        "TensorRT Edge-LLM",
        "edge_llm.py",
        packages=(
            "tensorrt-edgellm==0.11.0",
            "transformers==5.14.1",
            "huggingface_hub<2",
            *_OLDER_HUB,
            "numpy==2.2.6",
            "onnx==1.19.0",
            "onnx-graphsurgeon==0.6.1",
            "onnxscript==0.7.1",
        ),
        telling=r"Loaded \d+ tensors, skipped \d+",
    ),
    Peer("mobius", "mobius_build.py", packages=("mobius-onnx==0.1.0", "onnx-shape-inference")),
)

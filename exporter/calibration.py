"""``calibration.json``: the largest magnitude that each module's inputs, and each KV cache, are to be rounded within.

``shuntyard calibrate`` writes it (``validate/calibrate.py``). Modules have the checkpoint's names, and routed experts
one each: ``model.layers.N.feed_forward.experts.E.up_proj``. Its input is the token's state times its score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from shuntyard.errors import CheckpointError
from shuntyard.exporter.checkpoint import Checkpoint
from shuntyard.exporter.config import explain
from shuntyard.exporter.quantise import LEAST_SCALE
from shuntyard.exporter.strict_json import read_json
from shuntyard.plugins.contract import LARGEST_CODE

LEAST_CLIP = LARGEST_CODE * float(LEAST_SCALE)
"""Of a smaller one the scale is no normal number of fp32, and what is divided by it overflows."""

HINT = "shuntyard calibrate the checkpoint again"


def _is_fp32(clip: float) -> float:
    if not LEAST_CLIP <= clip <= float(np.finfo(np.float32).max):
        raise ValueError(f"{clip} is out of the range of fp32")
    return clip


Clip = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_is_fp32)]
Count = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Calibration(BaseModel):
    """The whole file. Clips are in the units of the values that they bound."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    kind: Literal["calibration"] = "calibration"
    shuntyard: str
    checkpoint_fingerprint: Digest  # of the checkpoint that the reference ran: of its headers
    small_tensors_sha256: Digest  # and of the data of its norms, routers and scales
    text: str  # the file's name
    text_sha256: Digest
    tokens: Count  # of all windows
    windows: Count
    length: Count  # tokens a window
    method: str  # amax, "percentile 99.9" or mse
    reference: str  # "transformers 5.24.0"
    inputs: dict[str, Clip]  # of each module that can be quantised; of each expert's three
    keys: dict[str, Clip]  # by attention, as its cache holds them
    values: dict[str, Clip]
    unreached: list[str] = []  # experts that no token reached: they have the largest clip of their layer's
    zero: list[str] = []  # modules whose inputs were all zero, ``...self_attn.key`` too: their clip is 1

    def check(self, checkpoint: Checkpoint) -> None:
        """Holds the file to a checkpoint.

        Raises:
            CheckpointError: it was made of another one.
        """
        if self.checkpoint_fingerprint != checkpoint.fingerprint:
            raise CheckpointError(
                f"{checkpoint.path}: the calibration is of another checkpoint "
                f"({self.checkpoint_fingerprint[:16]}, this one is {checkpoint.fingerprint[:16]})",
                hint="shuntyard calibrate this one",
            )
        if self.small_tensors_sha256 != checkpoint.small_tensors_sha256():
            raise CheckpointError(
                f"{checkpoint.path}: the calibration is of another checkpoint of the same shapes: norms, routers or "
                "scales differ",
                hint="shuntyard calibrate this one",
            )

    def scale(self, module: str) -> float:
        """The scale of a module's inputs, an fp32 number.

        Raises:
            CheckpointError: the module was not calibrated.
        """
        return _scale(self.inputs, module)

    def cache_scale(self, attention: str, part: Literal["keys", "values"]) -> float:
        """The scale of what an attention caches; raises as :meth:`scale`."""
        return _scale(self.keys if part == "keys" else self.values, attention)


def _scale(clips: dict[str, float], name: str) -> float:
    if name not in clips:
        raise CheckpointError(f"the calibration does not have '{name}'", hint=HINT)
    return float(np.float32(clips[name]) / np.float32(LARGEST_CODE))


def read_calibration(path: Path) -> Calibration:
    """Reads a calibration.

    Raises:
        CheckpointError: there is none, or it is broken; names the key.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such calibration", hint="shuntyard calibrate CKPT OUT --text FILE makes one")
    try:
        raw = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=HINT) from error
    for key in Calibration.model_fields:
        if key not in raw:
            raise CheckpointError(f"{path}: {key}: is missing", hint=HINT)
    try:
        return Calibration.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(explain(error, path).message, hint=HINT) from error

"""Every planted fault is caught, and the module to look at is named; the same models without one pass.

Faults of a checkpoint and of the model's code are planted in the eager model; those of a graph or of an engine's run in
real engines. ``bench/faults.py`` plants all of them in engines of the trained miniature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from shuntyard.errors import CheckpointError
from shuntyard.exporter.export import export
from shuntyard.validate.validate import Plan, validate
from tests.validate import faulty
from tests.validate import planting as p
from tests.validate.faults import FAULTS, Fault
from tests.validate.faulty import Base, Verdict

ENGINE = [fault for fault in FAULTS if not fault.is_eager]
EAGER = [fault for fault in FAULTS if fault.is_eager]
CHUNK_SEEN = 16  # tokens that are decoded: over a chunk's edge


@dataclass(frozen=True)
class Kept:
    """Sound models by name, the exported plain one, and what the reference computed on them."""

    bases: dict[str, Base]
    model: Path
    cache: Path

    def plan(self, base: Base) -> Plan:
        """The reference runs once for all tests."""
        return Plan(base.inputs, decode=CHUNK_SEEN, allow_other_files=True, cache=self.cache)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("faults")
    bases = {name: faulty.write_base(folder, name) for name in faulty.BASES}
    export(bases["plain"].checkpoint, folder / "model")
    return Kept(bases, folder / "model", folder / "cache")


def check(fault: Fault, found: Verdict) -> None:
    assert found.caught, "not caught"
    assert found.named, f"named {found.culprit or 'nothing'} ({found.mode}), not {fault.right}: {found.failures}"


@pytest.mark.parametrize("fault", EAGER, ids=lambda fault: fault.name)
def test_in_the_eager_model(fault: Fault, kept: Kept, tmp_path: Path) -> None:
    base = kept.bases[fault.base]
    checkpoint = faulty.spoilt(fault, base, tmp_path / "checkpoint")
    with faulty.code_planted(fault, base, eager=True):
        if fault.refused:
            with pytest.raises(CheckpointError, match=fault.refused):
                validate(f"eager:{checkpoint}", str(base.checkpoint), kept.plan(base))
            return
        report = validate(f"eager:{checkpoint}", str(base.checkpoint), kept.plan(base))
    check(fault, faulty.verdict(fault, report))


@pytest.mark.parametrize("fault", ENGINE, ids=lambda fault: fault.name)
def test_in_an_engine(fault: Fault, kept: Kept, tmp_path: Path) -> None:
    assert not (fault.weights or fault.config or fault.code), "it would have to be exported"
    base = kept.bases[fault.base]
    engine = faulty.build_faulty(fault, base, kept.model, tmp_path / "engine")
    with faulty.run_planted(fault, base):
        report = validate(str(engine), str(base.checkpoint), kept.plan(base))
    check(fault, faulty.verdict(fault, report))


@pytest.mark.parametrize("name", faulty.BASES)
def test_without_a_fault(name: str, kept: Kept) -> None:
    """So what is caught above is what was planted."""
    base = kept.bases[name]
    report = validate(f"eager:{base.checkpoint}", str(base.checkpoint), kept.plan(base))
    assert report.passed and not report.culprit


def test_an_engine_without_a_fault(kept: Kept, tmp_path: Path) -> None:
    base = kept.bases["plain"]
    engine = faulty.build_faulty(Fault("none", ()), base, kept.model, tmp_path / "engine")
    report = validate(str(engine), str(base.checkpoint), kept.plan(base))
    assert report.passed and not report.culprit


def test_code_planted_with_nothing_changed_is_right(kept: Kept) -> None:
    """The rewritten mixture of experts and attention are sound but for their faults."""
    base = kept.bases["plain"]
    for code in (p.moe_with(), p.moe_with(score=lambda scores, logits: scores)):
        with faulty.code_planted(Fault("none", (), code=partial(_same, code)), base, eager=True):
            assert validate(f"eager:{base.checkpoint}", str(base.checkpoint), kept.plan(base)).passed


def _same(code: p.Code, chunk: int) -> p.Code:
    return code


def test_there_are_enough() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 50
    assert names[9 - 1] == "one channel of one expert 1.5 times too large"

"""``shuntyard precision`` and ``shuntyard export --recipe`` as people use them: what they say, write and refuse."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shuntyard.cli import console
from shuntyard.exporter import export as exporting
from shuntyard.exporter import rewrite as rewriting
from shuntyard.exporter.export import export
from shuntyard.exporter.recipe import SHIPPED, read_recipe
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.cli.test_refusals import refused, shuntyard
from tests.exporter.recipes import rule, tensors_of, write_calibration

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"
RAW = raw_config(num_hidden_layers=8)
STATIC = rule("*.v_proj", weights="fp8", activations="fp8-static")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = random_weights(parsed(RAW), seed=1, dtype=torch.bfloat16)
    return write_checkpoint(tmp_path_factory.mktemp("precision") / "own", RAW, weights, shards=2)


def written(folder: Path, text: str, name: str = "own.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def table_of(*arguments: str | Path) -> list[dict[str, Any]]:
    result = shuntyard("precision", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


class TestTable:
    def test_json(self, own: Path, tmp_path: Path) -> None:
        path = written(
            tmp_path, f'description = "ours"\n{rule("*.v_proj", weights="fp8")}{rule("lm_head", weights="fp32")}'
        )
        fp8, ours = table_of(own, "--recipe", "fp8", "--recipe", path)
        assert (fp8["recipe"], ours["recipe"], ours["description"]) == ("fp8", "own", "ours")
        files = sum(t.nbytes for t in tensors_of(own).values())
        assert fp8["bytes_stored"] == ours["bytes_stored"] == files
        rows = {row["module"]: row for row in ours["modules"]}
        assert rows["lm_head"] == {
            "module": "lm_head", "rule": 2, "stored": "bf16", "precision": "fp32, computed in fp32",
            "bytes_stored": 2 * 64 * 32, "bytes": 4 * 64 * 32,
        }  # fmt: skip
        v_proj = rows["model.layers.3.self_attn.v_proj"]
        assert (v_proj["rule"], v_proj["precision"]) == (1, "fp8 channel")
        assert (v_proj["bytes_stored"], v_proj["bytes"]) == (2 * 16 * 32, 16 * 32 + 4 * 16)
        q_proj = rows["model.layers.3.self_attn.q_proj"]
        assert (q_proj["rule"], q_proj["precision"]) == (None, "bf16") and q_proj["bytes"] == q_proj["bytes_stored"]
        saved = sum(row["bytes_stored"] - row["bytes"] for row in ours["modules"])
        assert ours["bytes_stored"] - ours["bytes"] == saved == 8 * (16 * 32 - 4 * 16) - 2 * 64 * 32
        assert any("no rule is about 'model.embed_tokens' and" in line for line in ours["warnings"])
        assert fp8["warnings"] == []

    def test_what_it_says_is_what_export_writes(self, own: Path, tmp_path: Path) -> None:
        """Bytes of weights and scales, for each recipe that can be; packed matrices have their shapes beside them."""
        int4 = written(tmp_path, rule("*.experts", weights="int4", group_size=8), "int4.toml")
        for name in (*SHIPPED[:-1], str(int4)):
            (found,) = table_of(own, "--recipe", name)
            out = tmp_path / f"out-{Path(name).stem}"
            export(own, out, recipe=read_recipe(name))
            tensors = tensors_of(out)
            assert found["bytes"] == sum(t.nbytes for n, t in tensors.items() if not n.endswith("weight_shape"))
            precision = json.loads((out / "shuntyard.json").read_text())["precision"]
            for row in found["modules"]:
                own_precision = precision[row["module"]]
                assert row["precision"].startswith(own_precision["weights"])
                assert ("dynamic" in row["precision"]) == (own_precision["activations"] == "fp8-dynamic")

    @pytest.mark.parametrize("name", ["stored", *SHIPPED[:-1]])
    def test_text(self, own: Path, name: str) -> None:
        result = shuntyard("precision", own, "--recipe", name)
        assert result.exit_code == 0 and result.stderr == ""
        lines = [line.strip() for line in result.stdout.splitlines()]
        said = " ".join(" ".join(lines).split())
        assert said.startswith(f"own, recipe {name} {read_recipe(name).description} module layers rule becomes")
        assert "norms, biases" in said
        saves = [line.split()[-1] for line in lines if line.startswith("all ")]
        assert saves[-1].endswith("%") == name.startswith("fp8")

    def test_groups_add_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every module is in one row of the short table, and has one of its own in the long one."""
        (found,) = table_of(MINIATURE, "--recipe", "fp8-ffn")
        monkeypatch.setattr(console.stdout, "width", 200)
        lines = shuntyard("precision", MINIATURE, "--recipe", "fp8-ffn", "--every").stdout.splitlines()
        names = [line.split()[0] for line in lines if line.strip().startswith(("model.", "lm_head"))]
        assert names == [row["module"] for row in found["modules"]]
        short = shuntyard("precision", MINIATURE, "--recipe", "fp8-ffn").stdout.splitlines()
        begin = next(i for i, line in enumerate(short) if set(line.strip()) == {"─"})
        now = sum(float(m) for line in short[begin + 1 :] if (m := _first_number(line)) is not None)
        assert now == pytest.approx(2 * found["bytes_stored"] / 1e6, abs=0.005 * len(short))

    def test_stored_shows_what_is_declared(self, own: Path, tmp_path: Path) -> None:
        path = written(tmp_path, rule("model.layers.*", weights="fp8", activations="fp8-static", kv_cache="fp8"))
        calibration = write_calibration(tmp_path / "calibration.json", own)
        export(own, tmp_path / "out", recipe=read_recipe(path), calibration=calibration)
        (found,) = table_of(tmp_path / "out", "--recipe", "stored")
        rows = {row["module"]: row["precision"] for row in found["modules"]}
        assert rows["model.layers.2.self_attn.q_proj"] == "fp8 channel, inputs static"
        assert rows["model.layers.2.self_attn"] == "KV cache fp8"
        assert found["bytes"] == found["bytes_stored"]
        (asked,) = table_of(own, "--recipe", path)
        assert asked["warnings"][-1].startswith(f"{8 * 7 + 4 + 8} modules need scales")
        assert asked["bytes"] == found["bytes"]

    def test_no_control_character_reaches_the_terminal(self, own: Path, tmp_path: Path) -> None:
        path = written(tmp_path, f'description = "\\u001b[31mred\\nline"\n{rule("*", weights="fp8")}')
        result = shuntyard("precision", own, "--recipe", path)
        assert result.exit_code == 0 and "\x1b" not in result.stdout + result.stderr
        assert "\\x1b[31mred\\nline" in result.stdout

    def test_unused_rules_are_warned_of(self, own: Path, tmp_path: Path) -> None:
        path = written(tmp_path, rule(["lm_haed", "*"], weights="bf16"))
        result = shuntyard("precision", own, "--recipe", path)
        assert result.stderr == f"warning: {path}: rule 1: 'lm_haed' matches no module\n"
        exported = shuntyard("export", own, tmp_path / "out", "--recipe", path)
        assert exported.exit_code == 0
        assert f"{path}: rule 1: 'lm_haed' matches no module" in " ".join(exported.stderr.split())


def _first_number(line: str) -> float | None:
    """Of a row, the column of megabytes as they are: the first of two or three numbers at its end."""
    found = re.search(r"\s([\d,]+\.\d\d)\s+[\d,]+\.\d\d(\s+-?[\d.]+%)?\s*$", line)
    return None if found is None else float(found[1].replace(",", ""))


class TestRefused:
    """One line with a hint, exit status 3, and nothing is written."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[[rule", "cannot be read as TOML"),
            (rule("*", weights="fp4"), "rule 1: key 'weights' should be"),
            (rule("*", weight="fp8"), "rule 1: key 'weight' is not known"),
            (rule("*.router", weights="bf16"), "rule 1: 'model.layers.1.feed_forward.router' cannot be bf16"),
            (rule("*.experts", weights="int4", group_size=16), "has 24 inputs, no multiple of group_size 16"),
            (rule("*", weights="int4", activations="fp8-dynamic"), "rule 1: activations fp8-dynamic need weights fp8"),
        ],
    )
    def test_recipes(self, own: Path, tmp_path: Path, text: str, message: str) -> None:
        path = written(tmp_path, text)
        for arguments in (("precision", own), ("export", own, tmp_path / "out")):
            refused(shuntyard(*arguments, "--recipe", path), str(path), message)
        assert [p.name for p in tmp_path.iterdir()] == ["own.toml"]

    @pytest.mark.parametrize("name", ["fp9", "nothing.toml", "a" * 5000])
    def test_no_such_recipe(self, own: Path, tmp_path: Path, name: str) -> None:
        for arguments in (("precision", own), ("export", own, tmp_path / "out")):
            refused(shuntyard(*arguments, "--recipe", name), name)
        assert not list(tmp_path.iterdir())

    def test_static_needs_a_calibration(self, own: Path, tmp_path: Path) -> None:
        path = written(tmp_path, STATIC)
        export_it = ("export", own, tmp_path / "out", "--recipe", path)
        refused(shuntyard(*export_it), "'model.layers.0.self_attn.v_proj' needs a scale for its activations")
        refused(shuntyard(*export_it, "--calibration", tmp_path / "nothing.json"), "nothing.json: no such calibration")
        other = write_checkpoint(tmp_path / "other", RAW, random_weights(parsed(RAW), seed=1))
        calibration = write_calibration(tmp_path / "calibration.json", other)
        refused(shuntyard(*export_it, "--calibration", calibration), "the calibration is of another checkpoint")
        (tmp_path / "broken.json").write_text("{")
        refused(shuntyard(*export_it, "--calibration", tmp_path / "broken.json"), "broken.json")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        result = shuntyard("precision", own, "--recipe", path)
        assert "warning:" in result.stderr and "8 modules need scales" in result.stderr

    def test_options_that_do_not_go_together(self, own: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        refused(
            shuntyard("export", own, out, "--recipe", "fp8", "--weights", "bf16"), "--recipe goes without --weights"
        )
        refused(shuntyard("export", own, out, "--recipe", "fp8", "--experts", "fused"), "--recipe goes without")
        calibration = write_calibration(tmp_path / "calibration.json", own)
        refused(shuntyard("export", own, out, "--calibration", calibration), "--calibration goes with --recipe")
        assert not out.exists()

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        refused(shuntyard("precision", tmp_path / "nowhere"), "nowhere: no such directory")
        refused(shuntyard("precision", tmp_path), "config.json: no such file")

    def test_int4_of_int4(self, own: Path, tmp_path: Path) -> None:
        int4 = written(tmp_path, rule("*.experts", weights="int4", group_size=8), "int4.toml")
        assert shuntyard("export", own, tmp_path / "int4", "--recipe", int4).exit_code == 0
        path = written(tmp_path, rule("lm_head", weights="fp8"))
        refused(shuntyard("export", tmp_path / "int4", tmp_path / "out", "--recipe", path), "is INT4 already")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_json_of_an_export(own: Path, tmp_path: Path) -> None:
    result = shuntyard("export", own, tmp_path / "out", "--recipe", "fp8", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["bytes_linked"] == 0 and facts["bytes_written"] > 0 and facts["waived"] == []
    manifest = json.loads((tmp_path / "out" / "shuntyard.json").read_text())
    recipe = read_recipe("fp8")
    assert manifest["recipe"] == {"name": "fp8", "sha256": recipe.sha256, "calibration_sha256": None}
    again = shuntyard("export", own, tmp_path / "again", "--recipe", "bf16", "--json")
    assert json.loads(again.stdout)["bytes_linked"] == sum(p.stat().st_size for p in own.glob("*.safetensors"))


KILLED = """
import os, signal, sys
from pathlib import Path
from shuntyard.exporter import export as exporting, rewrite
from shuntyard.exporter.recipe import read_recipe
exporting.rewrite = lambda *given, **named: rewrite.rewrite(*given, **{**named, "chunk_bytes": 2000, "workers": 1})
exporting.request_key = lambda targets, fingerprint: rewrite.request_key(targets, fingerprint, chunk_bytes=2000)
seen = []
def progress(name, done, total):
    seen.append(done)
    if len(seen) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
exporting.export(Path(sys.argv[1]), Path(sys.argv[2]), recipe=read_recipe(sys.argv[3]), progress=progress)
"""


def test_an_interrupted_export_goes_on(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, asked for again: it begins where it was, and the result is an undisturbed one's."""
    out, name = tmp_path / "out", "fp8-all-linear"
    done = subprocess.run([sys.executable, "-c", KILLED, own, out, name], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (partial,) = tmp_path.glob(".out.partial-*")
    assert not out.exists()
    monkeypatch.setattr(
        exporting, "rewrite", lambda *given, **named: rewriting.rewrite(*given, **{**named, "chunk_bytes": 2000})
    )
    monkeypatch.setattr(
        exporting, "request_key", lambda targets, mark: rewriting.request_key(targets, mark, chunk_bytes=2000)
    )
    seen: list[int] = []
    export(own, out, recipe=read_recipe(name), progress=lambda _, finished, total: seen.append(finished))
    assert seen[0] > 0  # what was done was not done again
    assert not partial.exists()
    export(own, tmp_path / "undisturbed", recipe=read_recipe(name))
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}


def test_another_recipe_does_not_go_on_with_it(own: Path, tmp_path: Path) -> None:
    """Nor one whose calibration has changed."""
    out, path = tmp_path / "out", written(tmp_path, STATIC)
    keys = set()
    for seed in (0, 1):
        calibration = write_calibration(tmp_path / f"{seed}.json", own, seed=seed)

        def look(place: Path, key: str) -> Any:
            keys.add(key)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporting, "resumable_directory", look)
            for name in (str(path), "fp8", "fp8-ffn"):
                with pytest.raises(KeyboardInterrupt):
                    export(own, out, recipe=read_recipe(name), calibration=calibration)
    assert len(keys) == 4

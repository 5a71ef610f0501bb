"""The search: bounds, hulls, models whose answer is known, and what is written of it."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.errors import EngineError, OutputError, UnsupportedError
from shuntyard.exporter.export import export
from shuntyard.exporter.recipe import Precision, nbytes, read_recipe, resolve
from shuntyard.validate import outputs
from shuntyard.validate.demo import miniature
from shuntyard.validate.inputs import windows_of
from shuntyard.validate.matrices import Numbers
from shuntyard.validate.outputs import write_new
from shuntyard.validate.precision_plot import LEVELS, level, render_search, sensitivity_maps
from shuntyard.validate.search import Found, _Search, candidates, check_found, lower_hull, search
from shuntyard.validate.search_recipe import Source, found_recipe, recipe_text
from shuntyard.validate.values import Tokens
from shuntyard.validate.within import parse_bound
from shuntyard.validate.worth import measure
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint

RAW = raw_config(hidden_size=32, intermediate_size=64, intermediate_size_mlp=96, head_dim=16)
CONFIG = parsed(RAW)
WINDOWS: list[Tokens] = [np.random.default_rng(i).integers(0, RAW["vocab_size"], 17) for i in range(4)]
SOURCE = Source("checkpoint", "0123456789abcdef" * 4, "a\ntext\x1b[31m.txt", "f" * 64)
UNUSED = "model.layers.0.feed_forward"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer adds nothing: its down_proj is zero, and so is what any precision of its three matrices costs."""
    weights = random_weights(CONFIG, seed=6, dtype=torch.bfloat16)
    weights[f"{UNUSED}.down_proj.weight"].zero_()
    return write_checkpoint(tmp_path_factory.mktemp("search") / "checkpoint", RAW, weights)


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> Found:
    return search(Numbers(checkpoint), parse_bound("kl<=0.002"), WINDOWS)


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [
        ("kl<=0.01", "kl", 0.01),
        (" kl <= 1e-3 ", "kl", 1e-3),
        ("kl<=0", "kl", 0.0),
        ("perplexity<=1%", "perplexity", 0.01),
        ("perplexity<=.5%", "perplexity", 0.005),
        ("top1>=0.99", "top1", 0.99),
        ("top1 >= 99.5 %", "top1", 0.995),
    ],
)
def test_bounds(text: str, metric: str, value: float) -> None:
    bound = parse_bound(text)
    assert bound.metric == metric and bound.value == pytest.approx(value, abs=1e-15)
    assert bound.holds(bound.value)
    worse = bound.value - 1e-9 if metric == "top1" else bound.value + 1e-9
    assert not bound.holds(worse) and bound.loss(worse) > bound.loss(bound.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not understood"),
        ("kl", "is not understood"),
        ("kl<0.01", "is not understood"),
        ("kl<=nan", "is not understood"),
        ("kl<=0.01 and top1>=0.9", "is not understood"),
        ("kl>=0.01", "bounded from the other side"),
        ("top1<=0.99", "bounded from the other side"),
        ("kl<=1%", "KL is no share"),
        ("perplexity<=12", "by how much it changes, in %"),
        ("kl<=-0.01", "nothing is within it"),
        ("perplexity<=-1%", "nothing is within it"),
        ("kl<=1e999", "nothing is within it"),
        ("top1>=1.01", "nothing is within it"),
        ("top1>=101%", "nothing is within it"),
    ],
)
def test_bounds_that_are_refused(text: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(why)) as caught:
        parse_bound(text)
    assert "kl<=0.01" in caught.value.hint or "perplexity<=1%" in caught.value.hint


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=9))
def test_lower_hull(points: list[tuple[int, int]]) -> None:
    own = [(size, float(loss), Precision(str(i))) for i, (size, loss) in enumerate(points)]
    hull = lower_hull(own)
    sizes = [size for size, _, _ in own]
    assert set(hull) <= set(own) and (hull[0][0], hull[-1][0]) == (max(sizes), min(sizes))
    slopes = [(b[1] - a[1]) / (a[0] - b[0]) for a, b in pairwise(hull)]
    assert all(a[0] > b[0] for a, b in pairwise(hull)) and all(a < b for a, b in pairwise(slopes))
    for size, loss, _ in own:  # none lies below
        at = np.interp(size, [point[0] for point in hull[::-1]], [point[1] for point in hull[::-1]])
        assert loss >= at - 1e-9


def test_candidates_are_what_can_be(checkpoint: Path) -> None:
    numbers = Numbers(checkpoint)
    resolved = resolve(read_recipe("bf16"), CONFIG)
    for module in resolved.modules:
        own = candidates(module, numbers)
        assert bool(own) == (module.kind in ("linear", "experts"))
        for precision in own:
            nbytes(module, precision)
            assert all(into % (precision.group_size or 1) == 0 for _, into in module.shapes)
            if precision.weights == "int4":
                assert (
                    any(into % (2 * precision.group_size) for _, into in module.shapes) or precision.group_size == 128
                )


def test_what_costs_nothing_is_found_exactly(checkpoint: Path) -> None:
    """Nothing is lost with three matrices alone, and no other one may be touched."""
    found = search(Numbers(checkpoint), parse_bound("kl<=0"), WINDOWS)
    base = dict(found.baseline.choice)
    changed = {name: own for name, own in found.best.choice if own != base[name]}
    assert set(changed) == {f"{UNUSED}.{part}_proj" for part in ("gate", "up", "down")}
    assert {own.weights for own in changed.values()} == {"int4"}
    assert found.best.value == 0 and found.best.within


def test_no_worse_than_any_shipped_recipe(checkpoint: Path, found: Found) -> None:
    """Held to what a shipped recipe costs, it finds one of as few bytes or fewer."""
    assert {trial.name for trial in found.shipped()} == {"bf16", "fp8", "fp8-ffn", "fp8-all-linear"}
    assert len(found.notes) == 1 and found.notes[0].startswith("recipe int4-experts is left out: ")
    assert found.notes[0].endswith("has 32 inputs, no multiple of group_size 128")
    for trial in found.shipped()[1:]:
        for bound in (f"kl<={trial.outcome.mean_kl:.17g}", f"top1>={trial.outcome.mean_top1:.17g}"):
            own = search(Numbers(checkpoint), parse_bound(bound), WINDOWS, moves=16)
            assert own.best.bytes < trial.bytes and own.best.within
            if bound.startswith("kl"):
                assert own.best.outcome.mean_kl <= trial.outcome.mean_kl
            else:
                assert own.best.outcome.mean_top1 >= trial.outcome.mean_top1


def test_what_is_found_is_measured_anew_the_same(checkpoint: Path, found: Found) -> None:
    _, resolved = found_recipe(found, SOURCE, CONFIG, Path("found.toml"))
    assert resolved.unused == ()
    base, worth = measure(checkpoint, [resolved], WINDOWS)
    assert worth.kl == pytest.approx(found.best.outcome.mean_kl, rel=1e-6) and 0 < worth.kl <= 0.002
    assert worth.bytes == found.best.bytes < base.bytes == found.baseline.bytes


def test_a_second_search_finds_the_same(checkpoint: Path, found: Found) -> None:
    again = search(Numbers(checkpoint), parse_bound("kl<=0.002"), WINDOWS)
    assert recipe_text(again, SOURCE) == recipe_text(found, SOURCE)
    assert render_search(again, SOURCE, "r") == render_search(found, SOURCE, "r")


def test_the_recipe_explains_itself(found: Found) -> None:
    text = recipe_text(found, SOURCE)
    assert all(line.isprintable() for line in text.splitlines())
    for said in ("kl<=0.002", "f" * 64, "68 tokens in 4 windows", "fp8-all-linear", "perplexity", "* is what this"):
        assert said in text
    for s in found.sensitivities:
        assert re.search(rf"^#   {re.escape(s.module)} ", text, re.M)
    changed = sum(own != dict(found.baseline.choice)[name] for name, own in found.best.choice)
    assert len(re.findall(r"^#   .*\d\*", text, re.M)) == changed > 0
    rules = text.count("[[rule]]")
    assert rules == 1 + len({own for name, own in found.best.choice if own != dict(found.baseline.choice)[name]})


def test_kinds_that_agree_are_one_glob(checkpoint: Path) -> None:
    everything = search(Numbers(checkpoint), parse_bound("kl<=1000"), WINDOWS, moves=4)
    text = recipe_text(everything, SOURCE)
    assert '"model.layers.*.self_attn.q_proj",' in text and '"model.layers.0.self_attn.q_proj"' not in text
    assert {own.weights for name, own in everything.best.choice if "proj" in name} == {"int4"}


def test_a_recipe_that_is_not_what_was_measured_is_refused(found: Found) -> None:
    wrong = dict(found.best.choice) | {"lm_head": Precision("fp32")}
    with pytest.raises(EngineError, match="the recipe makes 'lm_head' fp32"):
        check_found(found, wrong)


def test_a_fall_of_the_perplexity_is_a_change(checkpoint: Path) -> None:
    bound = parse_bound("perplexity<=1%")
    assert bound.holds(-0.01) and not bound.holds(-0.011) and bound.loss(-0.02) > bound.loss(0.01)
    said: list[str] = []
    found = search(Numbers(checkpoint), parse_bound("perplexity<=0.01%"), WINDOWS, moves=4, report=said.append)
    assert abs(found.best.value) <= 1e-4 and ", KL " in found.kept() and found.kept() in said[-1]


def test_a_text_too_short_for_the_bound_is_said(found: Found) -> None:
    base = found.baseline.outcome
    outcome = replace(
        base,
        tokens=np.full(40, 17),
        nll=np.linspace(1, 2, 40),
        kl=np.linspace(0, 0.1, 40),
        top1=np.linspace(0.9, 1, 40),
    )
    flat = replace(outcome, nll=np.full(40, 1.5))
    for narrow, wide in (("perplexity<=50%", "perplexity<=1%"), ("kl<=0.1", "kl<=0.001"), ("top1>=0.9", "top1>=0.999")):
        assert not parse_bound(narrow).doubt(outcome, flat)
        assert "wider than" in parse_bound(wide).doubt(outcome, flat)
    assert "few windows" in parse_bound("kl<=1").doubt(base, base)


def test_what_is_stored_as_int4_is_not_tried_as_that(tmp_path: Path) -> None:
    export(miniature(), tmp_path / "model", recipe=read_recipe("int4-experts"))
    own = _Search(Numbers(tmp_path / "model"), parse_bound("kl<=1"), WINDOWS, 0, print, lambda done, total: None)
    assert "int4-experts" not in own._shipped() and "fp8" in own._shipped()
    assert "is stored in INT4 of these groups already" in own.notes[0]


def test_files_appear_whole_and_replace_nothing(tmp_path: Path) -> None:
    write_new(tmp_path / "in" / "r.toml", "mine\n")
    with pytest.raises(OutputError, match="exists already"):
        write_new(tmp_path / "in" / "r.toml", "other")
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists already"):
        write_new(tmp_path / "in" / "dangling", "other")
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"r.toml", "dangling"}
    assert (tmp_path / "in" / "r.toml").read_text() == "mine\n" and not (tmp_path / "nowhere").exists()
    with pytest.raises(OutputError, match="cannot be written"):
        write_new(tmp_path / "in" / "r.toml" / "r.toml", "x")


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "r.toml"
    monkeypatch.setattr(outputs, "refuse_existing", lambda path: path.write_text("theirs"))
    with pytest.raises(OutputError, match="appeared meanwhile"):
        write_new(place, "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"] and place.read_text() == "theirs"


def test_what_it_costs_is_said_first(checkpoint: Path) -> None:
    said: list[str] = []
    heard: list[tuple[int, int]] = []
    numbers = Numbers(checkpoint)
    own = search(
        numbers,
        parse_bound("kl<=0.002"),
        WINDOWS,
        moves=4,
        report=said.append,
        progress=lambda done, total: heard.append((done, total)),
    )
    first = re.match(
        r"(\d+) precisions of single modules and 3 shipped recipes: (\d+) forward passes over 68 tokens; then at most "
        r"(\d+)",
        said[0],
    )
    assert first is not None and int(first[1]) == len(own.sensitivities)
    assert int(first[2]) - 1 <= own.passes <= int(first[2]) + int(first[3])
    assert heard[-1][0] == heard[-1][1] == round(own.passes * CONFIG.num_hidden_layers)
    assert all(done <= total for done, total in heard) and "found: " in said[-1]


class _Tags(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects texts and classes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes += (dict(attrs).get("class") or "").split()
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes += (dict(attrs).get("class") or "").split()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page(found: Found) -> None:
    page = render_search(found, SOURCE, "a <b> recipe")
    assert not re.search(r"(src|href)=|<script|url\(|@import", page) and "\x1b" not in page and "<b>" not in page
    tags = _Tags(page)
    base = dict(found.baseline.choice)
    changed = sum(own != base[name] for name, own in found.best.choice)
    assert tags.classes.count("chosen") == changed + 1  # and the legend's
    assert tags.classes.count("best") == 2 and tags.classes.count("shipped") == 1 + 3
    for name in ("fp8-all-linear", "bf16", "found", "lm_head", "kl<=0.002"):
        assert any(name in text for text in tags.texts), name
    for x in re.findall(r"translate\(([-0-9.]+) ([-0-9.]+)\)", page):
        assert 62 <= float(x[0]) <= 982 and 30 <= float(x[1]) <= 370


def test_maps_have_every_module_once(found: Found) -> None:
    maps = sensitivity_maps(found)
    assert maps is not None and len(maps.maps) == 3
    cells = [cell for own in maps.maps for cell in own.cells]
    assert len(cells) == len(found.sensitivities) == len({(cell.x, cell.y) for cell in cells})
    assert max(cell.level for cell in cells) == LEVELS and all(1 <= cell.level <= LEVELS for cell in cells)
    assert max(cell.x + maps.maps[0].cell for cell in cells) <= maps.width + 0.5


@given(st.floats(1e-12, 1e3), st.floats(1e-12, 1e3))
def test_levels_keep_the_order(a: float, b: float) -> None:
    assert a > b or level(a, 0) <= level(b, 0)
    assert level(0.0, 0) == 1


def test_on_the_trained_miniature() -> None:
    """The row of steps, bisection and moves beat INT4 experts on a model that was trained."""
    folder = miniature()
    numbers = Numbers(folder)
    text = folder / "held_out.txt"
    windows = [own.tokens for own in windows_of(text, folder, numbers.config, 2, 65, pytest.fail)]
    (_, int4) = measure(folder, [resolve(read_recipe("int4-experts"), numbers.config)], windows)
    found = search(numbers, parse_bound(f"kl<={int4.kl:.17g}"), windows, moves=8)
    assert found.best.outcome.mean_kl <= int4.kl and found.best.bytes < 0.95 * int4.bytes

"""The report's page: hostile text stays text, every failure is named, and a browser finds nothing to complain about."""

from __future__ import annotations

import math
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuntyard.errors import OutputError
from shuntyard.validate import charts, heatmap, page
from shuntyard.validate.page import render, visible, write_page
from shuntyard.validate.report import Check, Flip, Module, Report
from tests.validate.reports import make_report

FAULT = (5, "feed_forward.experts")
CULPRIT = "model.layers.5.feed_forward.experts"
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\" onmouseover='alert(1)'",
    "</title></svg></details>",
    "\x00\x07\x1b[31m\x85",
    "\ud800 lone \udfff",
    "\u202eevil\u2066\u200f",
    "\ufffe\U0001ffff",
    "{{ 7 * 7 }}{% raw %}",
    "שלום مرحبا",
    "&lt;b&gt; &amp;",
    "a\r\nb\tc",
)


class Page(HTMLParser):
    """Elements, attributes and text of a page; element names tell whether text became markup."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.styles: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self._style = False

    def handle_data(self, data: str) -> None:
        (self.styles if self._style else self.texts).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def hostile_report(text: str) -> Report:
    """One text in every field that a checkpoint, a path or a person may have put it into."""
    report = make_report(4, 4, fault=(2, "feed_forward.router"))
    report.engine, report.reference, report.backend, report.dtype = text, text, text, text
    report.culprit = text
    report.modules = [replace(m, where=text, module=text if m.layer == 2 else m.module) for m in report.modules]
    report.flips = [Flip(1, text, 3, text, text, text, [0], [1], 0.5, 0.1, False)]
    report.sequences = [replace(sequence, label=text, sha256=text) for sequence in report.sequences]
    report.notes, report.facts = [text], {text: text}
    report.precision = [{text: text}]
    report.checks = [Check(text, text, text, False, text, text), Check(text, math.nan, text, None, text, text)]
    assert report.regression is not None
    report.regression = replace(report.regression, path=text, entry=text, notes=[text])
    report.regression.gates[0] = replace(report.regression.gates[0], metric=text)
    return report


def shape(text: str) -> list[tuple[str, list[str]]]:
    """Elements with their attributes' names; breaks within names are left out, for they follow the dots of a text."""
    elements = Page(render(hostile_report(text))).elements
    return [(tag, sorted(attributes)) for tag, attributes in elements if tag != "wbr"]


PLAIN = shape("plain")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    assert shape(text) == PLAIN
    html = render(hostile_report(text))
    html.encode("utf-8")
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe]", html
    )
    assert visible(text).replace("\n", "↵").replace("\t", "⇥") in Page(html).text


@settings(max_examples=25, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_any_text_stays_text(text: str) -> None:
    assert shape(text) == PLAIN


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_visible_text_can_be_written_and_read(text: str) -> None:
    shown = visible(text)
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert visible(shown) == shown
    assert all(character in "\n\t" or character >= " " for character in shown)


def test_visible_names_what_cannot_be_seen() -> None:
    assert visible("a\x00b\u202ec\ud800\x7f") == "a␀b‹U+202E›c‹U+D800›␡"
    assert visible("naïve – 字") == "naïve – 字"


@pytest.mark.parametrize("report", [make_report(), make_report(fault=FAULT), Report("e", "r", "b", "fp32", 0)])
def test_nothing_is_asked_of_the_network(report: Report) -> None:
    html = render(report)
    parsed = Page(html)
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "use", "image")
        assert not any(
            name.startswith("on") or name in ("src", "srcset", "xlink:href", "action") for name in attributes
        )
        assert (attributes.get("href") or "#").startswith("#")
    assert parsed.styles and not re.search(r"url\(|@import|https?:", "".join(parsed.styles))
    assert "://" not in html


def test_a_failure_names_module_metric_value_bound_and_place() -> None:
    report = make_report(fault=FAULT)
    text = Page(render(report)).text
    (module,) = [m for m in report.modules if m.module == CULPRIT and m.mode == "forced"]
    assert text.count("FAILED") == 2  # title and heading
    why = page.why(report)
    for part in (CULPRIT, "teacher-forced", "relative error 0.760", "bound 0.0200", "38.0×", module.where):
        assert part in why
    assert f"{CULPRIT}, 38.0× its bound" in text  # beside its mark
    assert "wiring or KV cache" in page.why(make_report(fault=FAULT, mode="free"))


def test_every_failure_is_named() -> None:
    report = make_report(32, 8, fault=(3, "self_attn"), mode="free")
    report.at_most("prefill: made up", math.nan, 1.0)
    assert len(report.failures) > 20
    text = Page(render(report)).text
    assert all(check.name in text for check in report.failures)
    assert text.index(report.failures[0].name) < text.index("prefill: top-1 agreement")


def test_a_failure_without_a_culprit_is_told_by_its_check() -> None:
    report = Report("e", "r", "b", "fp32", 5)
    report.at_most("prefill: mean KL", 0.5, 0.03, "chunk 2")
    assert page.why(report) == "prefill: mean KL is 0.500, which is not <= 0.03 (chunk 2)."


def test_an_empty_report_says_that_it_says_nothing() -> None:
    parsed = Page(render(Report("e", "r", "b", "fp32", 0)))
    assert "says nothing about the engine" in parsed.text
    assert not [tag for tag, _ in parsed.elements if tag in ("section", "table")]
    assert not [attributes for tag, attributes in parsed.elements if tag == "a"]


def test_the_same_report_gives_the_same_page() -> None:
    assert render(make_report(fault=FAULT)) == render(make_report(fault=FAULT))
    assert render(make_report()) != render(make_report(seed=1))


def test_flips_out_of_bounds_come_first_and_the_rest_is_counted() -> None:
    report = make_report()
    tie = Flip(0, "chunk 0", 1, "a", "b", "c", [0], [1], 0.9, 1.0, True)
    report.flips = [replace(tie, token=i, margin=0.9 - i / 1000) for i in range(60)]
    report.flips.append(replace(tie, token=777, margin=0.2, bound=0.1, ok=False))
    html = render(report)
    assert "token 777" in html and html.index("token 777") < html.index("chunk 0, token 0<")
    assert "chunk 0, token 48<" in html and "chunk 0, token 49<" not in html
    assert "11 more are not shown" in html and "1 are no ties" in html


@pytest.mark.parametrize("error", [math.nan, math.inf, 0.0, 1e-30, 1e30])
def test_errors_of_any_size_are_drawn_inside_the_chart(error: float) -> None:
    bad = not error <= 0.02
    odd = Module("model.layers.1.self_attn", 1, "self_attn", "forced", error, 0.02, 0.1, 1.0, "here", 9, not bad)
    report = make_report(4, 4)
    report.modules = [odd if m.module == odd.module and m.mode == "forced" else m for m in report.modules]
    chart = charts.error_chart(report, "forced", 400, 3)
    assert chart is not None and chart.bound is not None
    assert all(chart.top <= mark.y <= chart.bottom and chart.left <= mark.x <= chart.right for mark in chart.marks)
    (mark,) = [mark for mark in chart.marks if mark.title.startswith(f"{odd.module}:")]
    assert mark.fault == bad == (mark.y < chart.bound)
    render(report)


@pytest.mark.parametrize(("layers", "experts"), [(4, 2), (48, 128), (128, 16)])
def test_marks_stand_over_their_layers_and_the_line_parts_good_from_bad(layers: int, experts: int) -> None:
    report = make_report(layers, experts, fault=(layers // 2, "self_attn.key"))
    chart = charts.error_chart(report, "forced", 400, 3)
    assert chart is not None and chart.bound is not None
    assert len(chart.marks) == len([m for m in report.modules if m.mode == "forced"])
    assert all((mark.y < chart.bound) == mark.fault for mark in chart.marks)
    (fault,) = [mark for mark in chart.marks if mark.fault]
    assert int((fault.x - chart.left) // chart.column) == layers // 2 + 1
    heat = heatmap.heat_map(report)
    assert heat is not None and heat.width <= charts.WIDTH and len(heat.rows) == layers


VALUES = {
    0.0: "0",
    1.0: "1",
    0.0123456: "0.0123",
    12.345: "12.3",
    999.9: "1,000",
    1234.5: "1,230",
    1.5e-7: "1.50e-7",
    -2e9: "-2.00e9",
    math.nan: "NaN",
    -math.inf: "-inf",
}


@pytest.mark.parametrize(("value", "text"), VALUES.items())
def test_three_significant_digits(value: float, text: str) -> None:
    assert charts.three(value) == text


def test_no_share_is_rounded_up_to_all() -> None:
    shares = {1.0: "100 %", 0.99999: "> 99.99 %", 0.9978: "99.78 %", 0.03125: "3.12 %", 0.0: "0 %"}
    assert {share: charts.percent(share) for share in shares} == shares


def test_alike_layers_share_a_row() -> None:
    columns, rows = page.precision([{"a": "bf16"}, {"a": "bf16"}, {"a": "int4", "b": "x"}]) or ([], [])
    assert columns == ["a", "b"]
    assert rows == [("0–1", ["bf16", ""]), ("2", ["int4", "x"])]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_page(make_report(), path)
    assert path.read_text(encoding="utf-8") == render(make_report())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_a_link_s_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "there" / "report.html")
    write_page(make_report(), link)
    assert link.is_symlink() and (tmp_path / "there" / "report.html").is_file()


@pytest.mark.parametrize("name", ["missing/report.html", "", "file/report.html", "/dev/null"])
def test_a_place_that_takes_no_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as error:
        write_page(make_report(), tmp_path / name)
    assert error.value.hint
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_page(make_report(), path)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("report.html", "old")]


ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    reports = {
        "passed": make_report(4, 4),
        "failed": make_report(4, 4, fault=(2, "feed_forward.router")),
        "large": make_report(48, 128, fault=(17, "feed_forward.router"), moe_every=2),
        "empty": Report("e", "r", "b", "fp32", 0),
        "hostile": hostile_report("".join(HOSTILE) + "x" * 300),
    }
    for name, report in reports.items():
        write_page(report, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in reports}


LOOKS = [
    *(("failed", scheme, width) for scheme in ("light", "dark") for width in (1280, 360)),
    ("passed", "light", 1280),
    ("hostile", "dark", 1280),
    ("hostile", "light", 360),
    ("empty", "dark", 360),
    ("large", "light", 1280),
    ("large", "dark", 360),
]


@pytest.mark.parametrize(("name", "scheme", "width"), LOOKS)
def test_a_browser_finds_nothing_to_complain_about(
    browser: Any, pages: dict[str, Path], name: str, scheme: str, width: int
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    requests: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(pages[name].as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if name != "large":  # which takes axe 8 seconds, and differs in numbers only
        found = axe.run(tab)
        assert found.response["passes"], "axe did not look"
        assert found.violations_count == 0, found.generate_report()
    assert requests == [pages[name].as_uri()]
    assert complaints == []
    tab.close()


@pytest.mark.parametrize(("name", "most"), [("failed", 6), ("large", 9), ("empty", 1)])
def test_it_prints_on_a_few_pages(browser: Any, pages: dict[str, Path], name: str, most: int) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto(pages[name].as_uri())
    pdf = tab.pdf(prefer_css_page_size=True)
    sheets = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 1 <= sheets <= most
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    if name == "failed":  # folded away on the screen, not on paper
        assert tab.evaluate("document.querySelector('#sequences table').getBoundingClientRect().height") > 50
    tab.close()

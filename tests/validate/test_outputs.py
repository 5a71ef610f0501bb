"""JUnit and annotations: every check is there, whatever characters its words have."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.errors import OutputError
from shuntyard.validate.outputs import MOST_ANNOTATIONS, github_annotations, junit_xml, write_file
from shuntyard.validate.report import Check, Regression, Report

LAYER = "model.layers.3.self_attn"
anything = st.text(st.characters(), max_size=30)
checks = st.lists(
    st.builds(
        Check,
        name=anything,
        value=st.floats() | anything,
        bound=anything,
        ok=st.sampled_from([True, False, None]),
        detail=anything,
        module=anything,
    ),
    max_size=30,
)


def _report(found: list[Check], **changes: object) -> Report:
    report = Report("an <engine>", "a & b", "onnxruntime", "fp32", 640, checks=found)
    for name, value in changes.items():
        setattr(report, name, value)
    return report


@pytest.fixture
def mixed() -> Report:
    return _report(
        [
            Check("prefill: mean KL", 1e-9, "<= 1e-08", True),
            Check("forced: lm_head: relative", 0.3, "<= 0.01", False, "sequence 'a', token 3", "lm_head"),
            Check(f"forced: {LAYER}: relative", 0.25, "<= 0.01", False, "sequence 'chunk 1', token 17", LAYER),
            Check("prefill: max abs error", 0.125, "-", None),
            Check("greedy: 96 tokens after 42", "differ at 3", "equal", False),
        ],
        notes=["not exercised: temperature, 100%\nof it"],
        culprit=LAYER,
        culprit_mode="forced",
        regression=Regression("base.json", "onnxruntime-fp32", 0.05, 8, []),
    )


def test_junit_has_every_check(mixed: Report) -> None:
    root = ElementTree.fromstring(junit_xml(mixed))
    (suite,) = root
    assert root.tag == "testsuites" and suite.tag == "testsuite"
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("5", "3", "1")
    assert suite.get("name") == "validate an <engine>"
    cases = suite.findall("testcase")
    assert [(case.get("classname"), case.get("name")) for case in cases] == [
        ("prefill", "mean KL"),
        ("forced", "lm_head: relative"),
        ("forced", f"{LAYER}: relative"),
        ("prefill", "max abs error"),
        ("greedy", "96 tokens after 42"),
    ]
    failure = cases[2].find("failure")
    assert failure is not None and failure.get("type") == "bound"
    assert failure.get("message") == f"{LAYER}: relative: 0.25, bound <= 0.01; sequence 'chunk 1', token 17"
    assert failure.text is not None and "first diverging module" in failure.text and "a & b" in failure.text
    skipped = cases[3].find("skipped")
    assert skipped is not None and "0.125" in (skipped.get("message") or "")
    assert cases[0].find("failure") is None and cases[0].find("skipped") is None
    properties = {p.get("name"): p.get("value") for p in suite.findall("properties/property")}
    assert properties["engine"] == "an <engine>" and properties["reference"] == "a & b"
    assert (properties["culprit"], properties["baseline_entry"]) == (LAYER, "onnxruntime-fp32")
    assert "100%" in (suite.findtext("system-out") or "")


ALLOWED = {
    "testsuites": ({"testsuite"}, {"name", "time", "tests", "failures", "disabled", "errors"}, set()),
    "testsuite": (
        {"properties", "testcase", "system-out", "system-err"},
        {
            "name",
            "tests",
            "failures",
            "errors",
            "time",
            "disabled",
            "skipped",
            "timestamp",
            "hostname",
            "id",
            "package",
        },
        {"name", "tests"},
    ),
    "properties": ({"property"}, set(), set()),
    "property": (set(), {"name", "value"}, {"name", "value"}),
    "testcase": (
        {"skipped", "error", "failure", "system-out", "system-err"},
        {"name", "assertions", "time", "classname", "status"},
        {"name"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"message"}, set()),
    "system-out": (set(), set(), set()),
}
"""Children, attributes and required attributes by element: junit-10.xsd of Jenkins' xUnit plugin."""


def _hold_to_schema(element: ElementTree.Element) -> None:
    children, attributes, required = ALLOWED[element.tag]
    assert {child.tag for child in element} <= children, element.tag
    assert required <= set(element.keys()) <= attributes, element.tag
    for child in element:
        _hold_to_schema(child)


@given(checks, anything, anything, st.lists(anything, max_size=3))
def test_junit_is_valid_whatever_the_words(found: list[Check], engine: str, culprit: str, notes: list[str]) -> None:
    report = _report(found, engine=engine, culprit=culprit, notes=notes)
    root = ElementTree.fromstring(junit_xml(report).encode("utf-8"))
    _hold_to_schema(root)
    (suite,) = root
    states = [
        False if case.find("failure") is not None else None if case.find("skipped") is not None else True
        for case in suite.findall("testcase")
    ]
    assert states == [check.ok for check in found]
    assert root.get("failures") == suite.get("failures") == str(states.count(False))


def _parsed(line: str) -> tuple[str, str, str]:
    """Kind, title and text of a workflow command, read as GitHub's runner does."""
    match = re.fullmatch(r"::(error|warning|notice) title=([^:,\r\n]*)::([^\r\n]*)", line)
    assert match, line
    kind, title, text = match.groups()
    for code, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        title = title.replace(code, character)
        if code not in ("%3A", "%2C"):
            text = text.replace(code, character)
    return kind, title, text


def test_annotations_of_a_failure(mixed: Report) -> None:
    lines = github_annotations(mixed)
    found = [_parsed(line) for line in lines]
    assert [kind for kind, _, _ in found] == ["error"] * 3 + ["warning", "notice"]
    _, title, text = found[0]
    assert (title, text) == (
        "shuntyard: forced (first diverging module)",
        f"{LAYER}: relative: 0.25, bound <= 0.01; sequence 'chunk 1', token 17",
    )
    assert lines[0].startswith("::error title=shuntyard%3A forced (first")
    assert lines[3] == "::warning title=shuntyard::not exercised: temperature, 100%25%0Aof it"
    assert found[4][2] == (
        f"an <engine> (onnxruntime, fp32) against a & b: FAILED 3 of 4 checks; first diverging module: {LAYER} (forced)"
    )


def test_annotations_of_a_pass() -> None:
    (line,) = github_annotations(_report([Check("prefill: mean KL", 0.0, "<= 1", True), Check("a: b", 1.0, "-", None)]))
    assert line.startswith("::notice title=shuntyard::") and line.endswith("a & b: passed 1 checks")


@pytest.mark.parametrize("count", [MOST_ANNOTATIONS, MOST_ANNOTATIONS + 1, 40])
def test_annotations_say_how_many_more_there_are(count: int) -> None:
    found = [Check(f"forced: m{i}: relative", 1.0, "<= 0", False, module=f"m{i}") for i in range(count)]
    errors = [_parsed(line) for line in github_annotations(_report(found)) if line.startswith("::error")]
    assert len(errors) == MOST_ANNOTATIONS
    if count > MOST_ANNOTATIONS:
        assert errors[-1][2] == f"and {count - MOST_ANNOTATIONS + 1} more failed checks; see the report"


@given(checks, anything, st.lists(anything, max_size=30))
def test_annotations_stay_on_their_lines(found: list[Check], engine: str, notes: list[str]) -> None:
    """No word can end a line, or begin a command of its own."""
    lines = [_parsed(line) for line in github_annotations(_report(found, engine=engine, notes=notes))]
    kinds = [kind for kind, _, _ in lines]
    failed = sum(check.ok is False for check in found)
    assert kinds.count("error") == min(failed, MOST_ANNOTATIONS)
    assert kinds.count("warning") == min(len(notes), MOST_ANNOTATIONS)
    assert kinds[-1] == "notice" and kinds.count("notice") == 1


def test_files_appear_by_rename(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.xml"
    write_file(path, "one\r\n")
    write_file(path, "ä")
    assert path.read_bytes() == "ä".encode()
    assert [file.name for file in path.parent.iterdir()] == ["report.xml"]
    with pytest.raises(OutputError, match="cannot be written") as caught:
        write_file(path / "under-a-file", "x")
    assert caught.value.hint
    with pytest.raises(OutputError):
        write_file(tmp_path / "deep", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["deep"]

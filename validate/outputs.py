"""A report as machines of a continuous integration read it: JUnit XML, and GitHub's annotations."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import shuntyard
from shuntyard.errors import OutputError
from shuntyard.exporter.output import refuse_existing
from shuntyard.validate.report import Check, Report

MOST_ANNOTATIONS = 10
"""Of each kind: GitHub shows no more of a step (docs.github.com, "Workflow commands", limits of annotations)."""

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for (section 2.2, Char), be it escaped."""


def write_file(path: Path, text: str) -> None:
    """Writes a file that appears, or replaces the one there was, by rename; a link's target, not the link.

    Raises:
        OutputError: it cannot be written there, or something else than a file is there.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():  # a rename would take the place of a device
        raise OutputError(f"{path}: is not a file: it cannot be written", hint="name a file to write to")
    with _partial(target, path, text) as partial:
        partial.rename(target)


def write_new(path: Path, text: str) -> None:
    """Writes a file that appears whole, and never takes the place of another.

    Raises:
        OutputError: something is there, or it cannot be written.
    """
    refuse_existing(path)
    with _partial(path, path, text) as partial:
        try:
            os.link(partial, path)  # this alone refuses to replace what appeared meanwhile
        except FileExistsError as error:
            raise OutputError(f"{path}: appeared meanwhile", hint="give another path, or remove it first") from error
        except OSError:  # no links on this file system
            refuse_existing(path)
            partial.rename(path)


@contextlib.contextmanager
def _partial(target: Path, path: Path, text: str) -> Iterator[Path]:
    """A new file beside ``target`` that holds the text, on the disk, until the block is left; ``path`` names it."""
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("x", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            yield partial
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}",
            hint="free some space, or write to another file system" if full else "give a place that you can write to",
        ) from error


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)


def _split(check: Check) -> tuple[str, str]:
    """The part and the rest of a check's name; a name without a part is its own."""
    part, colon, rest = check.name.partition(": ")
    return (part, rest) if colon else ("validate", check.name)


def _value(check: Check) -> str:
    return check.value if isinstance(check.value, str) else f"{check.value:.6g}"


def _sentence(check: Check) -> str:
    """``model.layers.3.self_attn relative: 0.2, bound <= 0.01, at token 7``."""
    _, what = _split(check)
    if check.module and check.module not in what:
        what = f"{check.module} {what}"
    return f"{what}: {_value(check)}, bound {check.bound}" + (f"; {check.detail}" if check.detail else "")


def junit_xml(report: Report) -> str:
    """One test suite, a test case for each check; what is not judged is skipped. Jenkins, GitLab and GitHub read it."""
    failed = sum(check.ok is False for check in report.checks)
    skipped = sum(check.ok is None for check in report.checks)
    counts = {"tests": str(len(report.checks)), "failures": str(failed), "errors": "0"}
    root = ElementTree.Element("testsuites", {"name": "shuntyard", **counts})
    suite = ElementTree.SubElement(
        root, "testsuite", {"name": _legal(f"validate {report.engine}"), **counts, "skipped": str(skipped)}
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report).items():
        ElementTree.SubElement(properties, "property", {"name": _legal(name), "value": _legal(value)})
    for check in report.checks:
        part, rest = _split(check)
        case = ElementTree.SubElement(suite, "testcase", {"classname": _legal(part), "name": _legal(rest)})
        message = _legal(_sentence(check))
        if check.ok is False:
            element = ElementTree.SubElement(case, "failure", {"message": message, "type": "bound"})
            culprit = f"\nfirst diverging module: {report.culprit} ({report.culprit_mode})" if report.culprit else ""
            element.text = _legal(f"{report.engine} against {report.reference}\n{_sentence(check)}{culprit}")
        elif check.ok is None:
            ElementTree.SubElement(case, "skipped", {"message": f"not judged; {message}"})
        else:
            ElementTree.SubElement(case, "system-out").text = message
    if report.notes:
        ElementTree.SubElement(suite, "system-out").text = _legal("\n".join(f"note: {note}" for note in report.notes))
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(report: Report) -> dict[str, str]:
    out = {
        "engine": report.engine,
        "reference": report.reference,
        "backend": report.backend,
        "dtype": report.dtype,
        "tokens": str(report.tokens),
        "shuntyard": shuntyard.__version__,
        "verdict": report.verdict,
    }
    if report.culprit:
        out |= {"culprit": report.culprit, "culprit_mode": report.culprit_mode}
    if report.regression is not None:
        out |= {"baseline": report.regression.path, "baseline_entry": report.regression.entry}
    return out


def github_annotations(report: Report) -> list[str]:
    """Lines for a step's stdout: an error for each failed check, a warning for each note, last a notice, the verdict.

    GitHub drops what is above its limit, so the last of ten says how many more there are.
    """
    lines = _limited("error", [(_title(report, check), _sentence(check)) for check in report.failures], "failed checks")
    lines += _limited("warning", [("shuntyard", note) for note in report.notes], "notes")
    judged = sum(check.ok is not None for check in report.checks)
    verdict = f"passed {judged} checks" if report.passed else f"FAILED {len(report.failures)} of {judged} checks"
    if report.verdict == "not judged":
        verdict = f"not judged: {report.unjudged}"
    text = f"{report.engine} ({report.backend}, {report.dtype}) against {report.reference}: {verdict}"
    if report.culprit:
        text += f"; first diverging module: {report.culprit} ({report.culprit_mode})"
    return [*lines, _command("notice", "shuntyard", text)]


def _title(report: Report, check: Check) -> str:
    culprit = bool(report.culprit) and check.module == report.culprit
    return f"shuntyard: {_split(check)[0]}" + (" (first diverging module)" if culprit else "")


def _limited(kind: str, items: list[tuple[str, str]], what: str) -> list[str]:
    shown = items if len(items) <= MOST_ANNOTATIONS else items[: MOST_ANNOTATIONS - 1]
    lines = [_command(kind, title, text) for title, text in shown]
    if len(shown) < len(items):
        lines.append(_command(kind, "shuntyard", f"and {len(items) - len(shown)} more {what}; see the report"))
    return lines


def _command(kind: str, title: str, text: str) -> str:
    """A workflow command, escaped as GitHub's toolkit does (actions/toolkit, packages/core/src/command.ts)."""
    data = _legal(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    prop = _legal(title).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{kind} title={prop.replace(':', '%3A').replace(',', '%2C')}::{data}"


def check_place(out: Path) -> None:
    """Before hours of work: whether a file can be made there.

    Raises:
        OutputError: something is there, or nothing can be written there.
    """
    refuse_existing(out)
    parent = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: cannot be written: {parent}", hint="give a place that you can write to")

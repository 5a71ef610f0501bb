"""The public-domain text that the miniature checkpoint is trained on, out of two works that Debian packages.

``jargon-text`` holds the Jargon File (in the public domain by its own statement), ``bible-kjv-text`` the King James
Bible (of 1611, its copyright has expired) in a packed form that the program in ``bible-kjv`` prints. Whole books of
the Bible and a contiguous range of letters of the lexicon are held out: nothing of them is trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("jargon-text", "bible-kjv", "bible-kjv-text")

HELD_OUT_LETTERS = "IJKL"
HELD_OUT_BOOKS = ("Ruth", "Esther", "Ecclesiastes", "Song of Solomon", "Jonah", "Hebrews", "James", "Revelation")

BOOKS = tuple(
    """Genesis, Exodus, Leviticus, Numbers, Deuteronomy, Joshua, Judges, Ruth, 1 Samuel, 2 Samuel, 1 Kings, 2 Kings,
    1 Chronicles, 2 Chronicles, Ezra, Nehemiah, Esther, Job, Psalms, Proverbs, Ecclesiastes, Song of Solomon, Isaiah,
    Jeremiah, Lamentations, Ezekiel, Daniel, Hosea, Joel, Amos, Obadiah, Jonah, Micah, Nahum, Habakkuk, Zephaniah,
    Haggai, Zechariah, Malachi, Matthew, Mark, Luke, John, Acts, Romans, 1 Corinthians, 2 Corinthians, Galatians,
    Ephesians, Philippians, Colossians, 1 Thessalonians, 2 Thessalonians, 1 Timothy, 2 Timothy, Titus, Philemon,
    Hebrews, James, 1 Peter, 2 Peter, 1 John, 2 John, 3 John, Jude, Revelation""".replace("\n    ", " ").split(", ")
)

_VERSE = re.compile(r"(?P<book>[1-3]?[A-Za-z]+)(?P<chapter>\d+):\d+ (?P<text>\S.*)")
_TABLE = re.compile(r"[\u2500-\u259f]")
_HEADWORD = re.compile(r":(?P<word>\S[^\n]*?):(?= |$)")
_PRONUNCIATION = re.compile(r"(?<= )/[^/\n]*/,? ?")
_CAPTION = re.compile(r"\s*\(The (?:next|previous) cartoon ")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_SECTION = re.compile(r"(?:Chapter|Appendix) \w+\. .*|  [0-9A-Z]")


@dataclass(frozen=True)
class Document:
    """A book of the Bible, or a chapter or letter of the Jargon File."""

    title: str
    text: str
    held_out: bool


@dataclass(frozen=True)
class Corpus:
    """All documents and the packages they come from."""

    documents: tuple[Document, ...]
    packages: dict[str, str]
    """Versions by package name."""

    def part(self, *, held_out: bool) -> list[str]:
        """The texts of either part, in order."""
        return [document.text for document in self.documents if document.held_out is held_out]

    def joined(self, *, held_out: bool) -> str:
        """Either part as one text: what the hashes are of, and what ``held_out.txt`` holds."""
        return "\n\n".join(self.part(held_out=held_out)) + "\n"


def sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def bible_documents(verses: Iterable[str]) -> Iterator[Document]:
    """Books out of lines such as ``Ge1:1 In the beginning ...``, all verses from the first to the last, in order."""
    titles = iter(BOOKS)
    book, chapter, title = "", "", ""
    lines: list[str] = []
    for line in verses:
        match = _VERSE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        if match["book"] != book:
            if lines:
                yield Document(title, "\n".join(lines), title in HELD_OUT_BOOKS)
            book, chapter, title, lines = match["book"], "", next(titles), []
        if match["chapter"] != chapter:
            chapter = match["chapter"]
            lines += ["", f"{title} {chapter}", ""] if lines else [f"{title} {chapter}", ""]
        lines.append(match["text"])
    yield Document(title, "\n".join(lines), title in HELD_OUT_BOOKS)
    if next(titles, None) is not None:
        raise ValueError(f"the Bible ends with '{title}', books are missing")


def jargon_documents(text: str) -> Iterator[Document]:
    """Chapters, letters of the lexicon and appendices of the Jargon File, without tables, indices and markup."""
    title = ""
    sections: dict[str, list[str]] = {}
    for block in re.split(r"\n[ \t]*\n", text.replace("\xa0", " ").replace("\t", "    ")):
        block = block.strip("\n")
        if _SECTION.fullmatch(block):
            title = block.strip()
            sections[title] = [] if len(title) == 1 else [title]
        elif title:  # what stands before the first chapter is the table of contents
            sections[title].append(block)
    for title, blocks in sections.items():
        letter = title if len(title) == 1 else ""
        if letter:  # a letter begins with the list of its headwords
            blocks = list(itertools.dropwhile(lambda block: not _HEADWORD.match(block.strip()), blocks))
        else:  # the last chapter before the lexicon ends with the list of all headwords
            blocks = list(itertools.takewhile(lambda block: block.strip() != "Glossary", blocks))
        text = "\n\n".join(filter(None, map(_paragraph, blocks)))
        yield Document(f"Jargon File, {title}", text, bool(letter) and letter in HELD_OUT_LETTERS)


def _paragraph(block: str) -> str:
    """A block as running text: reflowed, cross references and headwords without markup. Empty for tables and art."""
    lines = [line.rstrip() for line in block.split("\n")]
    match = _HEADWORD.match(block.strip())
    solid = "".join("".join(lines).split())
    if not match and (not solid or sum(map(str.isalpha, solid)) < 0.7 * len(solid) or _TABLE.search(block)):
        return ""
    if _CAPTION.match(block):
        return ""
    indents = {len(line) - len(line.lstrip()) for line in lines}
    is_prose = len(indents) == 1 or lines[0].lstrip().startswith("•")
    text = (" " if is_prose else "\n").join(line.strip() for line in lines)
    if match is not None:
        text = match["word"] + ":" + _PRONUNCIATION.sub("", text[match.end() :]).rstrip()
    return _REFERENCE.sub(r"\1", text)


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return done.stdout


def _read(root: Path, packages: dict[str, str]) -> Corpus:
    jargon = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode("utf-8")
    verses = _run(root / "usr/bin/bible", "-f", "-p", root / "usr/lib", "gen1:1-rev22:21").splitlines()
    return Corpus((*jargon_documents(jargon), *bible_documents(verses)), packages)


def from_installed() -> Corpus:
    """The corpus out of the packages as they are installed on this machine."""
    versions = {name: _run("dpkg-query", "-W", "-f=${Version}", name) for name in PACKAGES}
    return _read(Path("/"), versions)


def from_packages(folder: Path | None = None) -> Corpus:
    """The corpus out of package files in ``folder``; what is missing is downloaded with ``apt-get``.

    Nothing is installed: the packages are unpacked beside each other in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        debs = (folder or Path(scratch)).resolve()
        root = Path(scratch) / "root"
        versions = {}
        for name in PACKAGES:
            if not any(debs.glob(f"{name}_*.deb")):
                _run("apt-get", "download", name, cwd=debs)
            deb = max(debs.glob(f"{name}_*.deb"), key=os.path.getmtime)
            _run("dpkg-deb", "-x", deb, root)
            versions[name] = _run("dpkg-deb", "-f", deb, "Version").strip()
        return _read(root, versions)

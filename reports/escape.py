"""Text from runs into each output format, as text: nothing that a run is called or logs may act as markup.

Each function takes any text and returns what shows that text in its format. Control characters (ANSI codes) are
shown by their Unicode pictures everywhere.
"""

import itertools
import re
import unicodedata
from functools import cache

_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_CONTROLS |= dict.fromkeys([*range(128, 160), *range(8234, 8239), *range(8294, 8298)], 65533)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]|$~^])")
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\char96{}",
    "÷": r"\ensuremath{\div}",
    "/": r"/\allowbreak{}",  # addresses break there
    "-": "{-}",  # no ligatures out of -- and ---
    "\n": " ",
    "\t": " ",
    "±": r"\ensuremath{\pm}",
    "−": r"\ensuremath{-}",
    "×": r"\ensuremath{\times}",
    "→": r"\ensuremath{\rightarrow}",
    "≥": r"\ensuremath{\geq}",
    "≤": r"\ensuremath{\leq}",
    "Δ": r"\ensuremath{\Delta}",
    "…": r"\ldots{}",
    "–": "--",
    "—": "---",
    "†": r"\dag{}",
    "²": r"\textsuperscript{2}",
}
_FORMULA = re.compile(r"^\s*[=+\-@\t\r]")


def clean(text: object) -> str:
    """The text with control and direction-changing characters made visible; newlines and tabs stay."""
    plain = str(text)
    return plain if plain.isprintable() else plain.translate(_CONTROLS)


def one_line(text: object) -> str:
    """Text for one line of a terminal."""
    return " ".join(clean(text).split())


def markdown(text: object) -> str:
    """Text for a Markdown paragraph or table cell."""
    plain = one_line(text)
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([+\-#])", r"\\\1", _MARKDOWN.sub(r"\\\1", plain))


def latex(text: object) -> str:
    """Text for LaTeX. Chinese, Japanese and Korean are given twice, ``\\mpfcjk{as written}{spelt}``: which one is set
    depends on the engine and its packages; what else pdfTeX's fonts lack is its code point.
    """
    parts = itertools.groupby(clean(text), key=_is_east_asian)
    return "".join(_latex_cjk("".join(chars)) if east else _latex_plain("".join(chars)) for east, chars in parts)


def _latex_plain(text: str) -> str:
    return "".join(_LATEX.get(char) or _latex_other(char) for char in text)


def _latex_cjk(text: str) -> str:
    return rf"\mpfcjk{{{text}}}{{{''.join(map(spelt, text))}}}"


def _is_east_asian(char: str) -> bool:
    """Whether it is a Chinese, Japanese or Korean letter of the Basic Multilingual Plane."""
    return "\u3040" <= char <= "\u30ff" or "\u3400" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7a3"


def has_east_asian(text: object) -> bool:
    """Whether a text has Chinese, Japanese or Korean letters."""
    return any(map(_is_east_asian, str(text)))


def _latex_other(char: str) -> str:
    if " " <= char <= "~" or ("À" <= char <= "ÿ" and char not in "ÐðÞþ"):
        return char
    return rf"\texttt{{[U+{ord(char):04X}]}}"


def figure(text: object, most: int = 0) -> str:
    """Text for a figure, in which nothing is mathematics (the style sees to that): one line, of at most ``most``
    characters if that is not 0, without a leading underscore, by which matplotlib hides a label. What no font has is
    spelt (:func:`spelt`).
    """
    line = one_line(text)
    line = line if not most or len(line) <= most else line[: most - 1] + "…"
    line = "".join(char if ord(char) in _drawable() else spelt(char) for char in line)
    return re.sub(r"^_", "\u200b_", line)


@cache
def _drawable() -> frozenset[int]:
    from analysis.style import drawable

    return drawable() | {0x200B}


def is_spelt(text: object) -> bool:
    """Whether a figure cannot show the text as it is written."""
    return any(ord(char) not in _drawable() for char in clean(text))


SPELT = "Names in letters that no installed font has are written by their sounds, or as code points."


def spelt(char: str) -> str:
    """A character in Latin letters: Korean syllables and Japanese kana by their sound, others as their code point."""
    words = unicodedata.name(char, "").split()
    sounds = words[:2] == ["HANGUL", "SYLLABLE"] or (words[:1] in (["HIRAGANA"], ["KATAKANA"]) and "LETTER" in words)
    return words[-1].lower() if sounds else f"[U+{ord(char):04X}]"


def csv(text: object) -> str:
    """Text for a CSV field that a spreadsheet must not run as a formula."""
    plain = clean(text)
    return f"'{plain}" if _FORMULA.match(plain) else plain


def slug(text: object) -> str:
    """Lower-case letters, digits, dots and hyphens: for file names, anchors and LaTeX keys."""
    return re.sub(r"[^a-z0-9.]+", "-", str(text).lower()).strip("-.") or "x"

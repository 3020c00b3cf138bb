"""Text from runs into each output format, as text: nothing that a run is called or logs may act as markup.

Each function takes any text and returns what shows that text in its format. Control characters (ANSI codes) are
shown by their Unicode pictures everywhere.
"""

import re

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


def markdown(text: object) -> str:
    """Text for a Markdown paragraph or table cell."""
    plain = " ".join(clean(text).split())
    plain = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([+\-#])", r"\\\1", _MARKDOWN.sub(r"\\\1", plain))


def latex(text: object) -> str:
    """Text for LaTeX; a character that pdfTeX's fonts lack is spelt as its code point."""
    return "".join(_LATEX.get(char) or _latex_other(char) for char in clean(text))


def _latex_other(char: str) -> str:
    if " " <= char <= "~" or ("À" <= char <= "ÿ" and char not in "ÐðÞþ"):
        return char
    return rf"\texttt{{[U+{ord(char):04X}]}}"


def csv(text: object) -> str:
    """Text for a CSV field that a spreadsheet must not run as a formula."""
    plain = clean(text)
    return f"'{plain}" if _FORMULA.match(plain) else plain


def slug(text: object) -> str:
    """Lower-case letters, digits, dots and hyphens: for file names, anchors and LaTeX keys."""
    return re.sub(r"[^a-z0-9.]+", "-", str(text).lower()).strip("-.") or "x"

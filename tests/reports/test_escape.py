"""One escape per format: whatever a name is, it is text there. What pages and LaTeX make of a whole hostile store is in
``test_hostile.py``.
"""

import re
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.style import styled
from reports import escape

HOSTILE = st.text(
    st.one_of(
        st.sampled_from(list("$\\{}_^%#&~<>|`'\"=+-@\t\n\x00\x1b\u202e\u2066\x7f[]()!*/")),
        st.sampled_from(list("中文ひらカナ한글é€😀\u0301\u200b")),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)


@given(HOSTILE)
def test_latex(text: str) -> None:
    made = escape.latex(text)
    plain = re.sub(r"\\[{}$&#%_]", "", made)
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"(?<!\\)[$&#%]|\n|\^|(?<!\\)~", re.sub(r"\\mpfcjk", "", plain))
    commands = set(re.findall(r"\\([a-zA-Z]+)", plain))
    known = set(re.findall(r"\\([a-zA-Z]+)", "".join(escape._LATEX.values()))) | {"texttt", "mpfcjk"}
    assert commands <= known


@given(HOSTILE)
def test_markdown(text: str) -> None:
    made = escape.markdown(text)
    assert not re.search(r"[<>\n]|(?<!\\)[`*_|$\[\]]", made.replace("\\\\", ""))


@given(HOSTILE)
def test_csv(text: str) -> None:
    assert not re.match(r"\s*[=+\-@\t\r]", escape.csv(text))


@given(HOSTILE)
def test_slug(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9.\-]+", escape.slug(text))
    assert not escape.slug(text).startswith(".")


@settings(max_examples=40, deadline=None)
@given(HOSTILE)
def test_figure(text: str) -> None:
    """Drawn as it is: no formula that could fail, no letter that no font has, nothing hidden."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = escape.figure(text, 20)
    assert len(made.splitlines()) <= 1
    assert not made.startswith("_")
    with styled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure(figsize=(1, 1))
        figure.text(0.5, 0.5, made)
        FigureCanvasAgg(figure).draw()


def test_names_in_other_scripts_are_spelt_where_no_font_has_them() -> None:
    assert escape.spelt("한") == "han"
    assert escape.spelt("ひ") == "hi"
    assert escape.spelt("中") == "[U+4E2D]"
    assert escape.latex("a中文b") == r"a\mpfcjk{中文}{[U+4E2D][U+6587]}b"
    assert escape.figure("5$ a^_{") == "5$ a^_{"

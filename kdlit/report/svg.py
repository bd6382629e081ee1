"""Matplotlib figures as pieces of a page: colours that follow its theme, text as text, ids of their own."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that nobody draws with, each replaced by a variable of the style sheet.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = tuple(f"#01030{number}" for number in range(1, 9))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {SERIES[i]: f"s{i + 1}" for i in range(len(SERIES))}
_BLACK = {"#000000": "ink", "#262626": "ink"}  # what others draw text and axes in
_FONT = "var(--sans)"
_FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # in XML, not in names of classes
_LARGEST_SVG = 300_000  # bytes; a heat map of many cells, say, is smaller as a picture
_STYLE = {
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "text.color": INK,
    "text.parse_math": False,  # names with a dollar sign are names
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the style of the page, whatever matplotlib is set to outside."""
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]):
        yield


def new_figure(height: float = 2.5) -> Figure:
    """An empty figure as wide as a column of the page; its text stays legible on a phone.

    Args:
        height: in inches, at a width of 4.3.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3, height))
    figure.subplots_adjust(0.15, 0.45 / height, 0.97, 1 - 0.1 / height)  # a layout that fits itself takes twice as long
    return figure


def as_html(figure: Figure, prefix: str, label: str, on_white: bool = False) -> Markup:
    """A figure as inline SVG or, where that would be large, as a PNG.

    Args:
        figure: black text and axes, and the colours of this module, follow the theme of the page.
        prefix: makes ids unique on the page.
        label: what a screen reader says.
        on_white: whether it is to stand on white in the dark theme, too.
    """
    import matplotlib

    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kdlit"}):
        warnings.simplefilter("ignore")  # a glyph that no font has, a layout that is tight
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
        if len(text.getvalue()) > _LARGEST_SVG:
            return _as_picture(figure, label)
    root = ElementTree.fromstring(_FORBIDDEN.sub("\ufffd", text.getvalue()))
    for element in list(root):
        if element.tag.endswith("metadata"):
            root.remove(element)
    used = {name for element in root.iter() for value in element.attrib.values() for name in _references(value)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if (name := element.attrib.pop("id", None)) in used:
            element.set("id", f"{prefix}-{name}")
        for key, value in element.attrib.items():
            element.set(key, _themed(key, value, prefix))
    for style in [child for child in root.iter("defs") if child.find("style") is not None]:
        root.remove(style)  # its rule would hold for the whole page; the class below says the same
    width, height = (root.attrib.pop(name).removesuffix("pt") for name in ("width", "height"))
    root.attrib.setdefault("viewBox", f"0 0 {width} {height}")
    root.attrib.pop("version", None)
    root.set("role", "img")
    root.set("aria-label", label)
    root.set("class", "drawing paper" if on_white else "drawing")
    return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))


def _references(value: str) -> list[str]:
    return re.findall(r"^#([\w.-]+)$", value) + re.findall(r"url\(#([\w.-]+)\)", value)


def _themed(key: str, value: str, prefix: str) -> str:
    if key in ("d", "points"):  # a hundredth of a pixel is enough
        return re.sub(r"(\.\d\d)\d+", r"\1", value).replace("\n", "")
    if key == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = re.sub(r"url\(#([\w.-]+)\)", rf"url(#{prefix}-\1)", value)
    if key == "style":
        value = re.sub(r"(font:[^;]*?px) [^;]+", rf"\1 {_FONT}", value)
        value = re.sub(r"font-family:[^;]+", f"font-family: {_FONT}", value)
        for colour, name in (_VARIABLES | _BLACK).items():
            value = value.replace(colour, f"var(--{name})")
    return value


def _as_picture(figure: Figure, label: str) -> Markup:
    from PIL import Image

    content, smaller = io.BytesIO(), io.BytesIO()
    figure.savefig(content, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    Image.open(content).convert("RGB").quantize(64).save(smaller, "png", optimize=True)
    return picture(smaller.getvalue(), "png", label, "drawing paper")


def picture(content: bytes, kind: str, label: str, css_class: str, **attributes: Any) -> Markup:
    """A picture whose bytes are part of the page.

    Args:
        content: of the file.
        kind: ``png`` or ``jpeg``.
        label: alternative text.
        css_class: its class.
        **attributes: further ones.
    """
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    more = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    return Markup(f'<img class="{escape(css_class)}" src="{source}" alt="{escape(label)}"{more}>')

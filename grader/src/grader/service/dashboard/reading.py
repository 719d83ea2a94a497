"""The course's Markdown as HTML: READMEs and lectures.

HTML in Markdown is cleaned, whoever wrote it: of it the course needs `<details>` and little else. Formulas in
dollars become MathML here, so that no page loads a library. Links lead to this server's pages where there is one.
"""

import functools
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import latex2mathml.converter
import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from grader.catalog import Catalog

_FORMULA = """
    math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom mroot mrow ms mspace msqrt mstyle msub
    msubsup msup mtable mtd mtext mtr munder munderover
"""
_MATHML = frozenset(_FORMULA.split())
_TEXT = """
    a blockquote br code dd del details div dl dt em figure h1 h2 h3 h4 h5 h6 hr img kbd li ol p pre s span
    strong sub summary sup table tbody td th thead tr ul
"""
_TAGS = _MATHML | frozenset(_TEXT.split())
_ATTRIBUTES = {
    "a": {"href", "rel"},
    "code": {"class"},
    "div": {"class", "tabindex", "role", "aria-label"},
    "img": {"src", "alt", "loading"},
    "math": {"display", "xmlns"},
    "menclose": {"notation"},
    "mfrac": {"linethickness"},
    "mi": {"mathvariant"},
    "mn": {"mathvariant"},
    "mo": {"stretchy", "fence", "form", "lspace", "rspace", "minsize", "maxsize", "movablelimits", "accent"},
    "mover": {"accent"},
    "mspace": {"width"},
    "mstyle": {"displaystyle", "scriptlevel"},
    "mtd": {"columnalign"},
    "mtable": {"columnalign"},
    "ol": {"start"},
    "pre": {"class", "tabindex"},
    "span": {"class"},
    "td": {"class"},
    "th": {"class"},
} | {f"h{n}": {"id"} for n in range(1, 7)}

Resolve = Callable[[str], str | None]
"""Turns a link into one that works here; None if there is no page for it."""


@dataclass(frozen=True)
class Text:
    """A rendered page.

    Attributes:
        title: its first heading, as plain text; it is not in `html` again.
        html: safe to put into a page.
    """

    title: str
    html: str


class Library:
    """Renders the course's files, each once until it changes."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._markdown = _markdown()
        self._read = functools.lru_cache(maxsize=256)(self._render)

    def text(self, file: Path) -> Text | None:
        """Return `file` rendered; None if it is not there."""
        try:
            changed = file.stat()
        except OSError:
            return None
        return self._read(file, changed.st_mtime_ns, changed.st_size)

    def _render(self, file: Path, _mtime: int, _size: int) -> Text:
        tokens = self._markdown.parse(file.read_text(encoding="utf-8", errors="replace"))
        title = ""
        if len(tokens) > 2 and tokens[0].type == "heading_open" and tokens[0].tag == "h1":
            title = "".join(part.content for part in tokens[1].children or ())
            tokens = tokens[3:]
        _point(tokens, functools.partial(self._address, file.parent))
        page = self._markdown.renderer.render(tokens, self._markdown.options, {})
        return Text(
            title,
            nh3.clean(
                page,
                tags=set(_TAGS),
                attributes={tag: set(names) for tag, names in _ATTRIBUTES.items()},
                link_rel=None,
                url_schemes={"http", "https"},
            ),
        )

    def _address(self, folder: Path, link: str) -> str | None:
        parts = urlsplit(link)
        if parts.scheme in ("http", "https"):
            return link
        fragment = f"#{_anchor(parts.fragment)}" if parts.fragment else ""
        if not parts.scheme and not parts.netloc and not parts.path:
            return fragment or None
        target = (folder / unquote(parts.path)).resolve()
        for chapter in self._catalog.chapters:
            if target in (chapter.path, chapter.path / "README.md"):
                return f"/chapters/{chapter.id}{fragment}"
            if target.is_relative_to(chapter.path / "docs"):
                below = target.relative_to(chapter.path / "docs")
                if target.suffix == ".md":
                    return f"/chapters/{chapter.id}/lectures/{below.stem}{fragment}"
                if target.suffix in FIGURES:
                    return f"/chapters/{chapter.id}/docs/{below.as_posix()}"
            for lab in chapter.labs:
                if target in (lab.path, lab.path / "README.md"):
                    return f"/labs/{lab.id}{fragment}"
        return None


_IMAGE = re.compile(r"<img\b[^>]*>", re.IGNORECASE)

FIGURES = {".svg": "image/svg+xml", ".png": "image/png"}
"""Files beside the lectures that a page may show, by suffix, with their media type."""


def code_as_html(source: str, language: str = "python") -> str:
    """Return source code as HTML, its parts marked by classes."""
    try:
        lexer = get_lexer_by_name(language)
    except ClassNotFound:
        return html.escape(source)
    return str(highlight(source, lexer, HtmlFormatter(nowrap=True)))


def _markdown() -> MarkdownIt:
    markdown = MarkdownIt(
        "commonmark", {"html": True, "highlight": lambda code, name, _: code_as_html(code, name)}
    )
    markdown.enable(["table", "strikethrough"])
    markdown.use(anchors_plugin, max_level=4, slug_func=_slug)
    markdown.use(
        dollarmath_plugin, allow_space=False, allow_digits=False, allow_labels=False, renderer=_formula
    )
    markdown.add_render_rule("table_open", _table_open)
    markdown.add_render_rule("table_close", _table_close)
    markdown.add_render_rule("fence", _fence)
    markdown.add_render_rule("th_open", _cell)
    markdown.add_render_rule("td_open", _cell)
    return markdown


def _formula(source: str, options: dict[str, Any]) -> str:
    try:
        display = "block" if options["display_mode"] else "inline"
        return str(latex2mathml.converter.convert(source, display=display))
    except Exception:  # it knows no error of its own; what it cannot read is shown as it was written
        return f"<code>{html.escape(source)}</code>"


def _table_open(*_: object) -> str:
    # A wide table scrolls by itself, also by keyboard, and the page does not.
    return '<div class="wide" tabindex="0" role="region" aria-label="Table"><table>\n'


def _table_close(*_: object) -> str:
    return "</table></div>\n"


def _fence(self: Any, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    token = tokens[index]
    language = token.info.split()[0] if token.info.strip() else ""
    return f'<pre class="code" tabindex="0"><code>{code_as_html(token.content, language)}</code></pre>\n'


def _cell(self: Any, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
    # markdown-it aligns by a style attribute, which the page's security policy forbids.
    token = tokens[index]
    side = re.search(r"text-align:(\w+)", str(token.attrGet("style") or ""))
    return f'<{token.tag} class="{side.group(1)}">' if side else f"<{token.tag}>"


def _slug(heading: str) -> str:
    return _anchor(re.sub(r"[^\w\s-]", "", heading.strip().lower()).replace(" ", "-"))


def _anchor(name: str) -> str:
    # Apart from the ids of the page around the text.
    return f"t-{name}"


def _point(tokens: Sequence[Token], address: Resolve) -> None:
    """Make every link and image lead to what this server has; links to nothing become plain text."""
    for token in tokens:
        _point(token.children or (), address)
        if token.type.startswith("html_"):
            # Pictures are written in Markdown, which gives them an address that works and a description.
            token.content = _IMAGE.sub("", token.content)
        if token.type == "image":
            token.attrSet("src", address(str(token.attrGet("src") or "")) or "")
            token.attrSet("loading", "lazy")
    opened: list[Token] = []
    for token in tokens:
        if token.type == "link_open":
            opened.append(token)
            if there := address(str(token.attrGet("href") or "")):
                token.attrSet("href", there)
                if there.startswith("http"):
                    token.attrSet("rel", "noopener noreferrer")
            else:
                token.tag = "span"
                token.attrs = {"class": "elsewhere"}
        elif token.type == "link_close" and opened:
            token.tag = opened.pop().tag

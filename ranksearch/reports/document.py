"""Documents as values: headings, paragraphs, tables, code and pictures, written as Markdown or as one HTML page."""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heading:
    """A title of a level from 1, the document's own, to 3."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Text in which `**` makes bold and backticks make code."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list without order."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells below a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to be typed or copied as they are."""

    text: str
    language: str = "sh"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, drawn as HTML with plotly's library in it or without; Markdown leaves it out."""

    draw: Callable[[bool], str]


Block = Heading | Paragraph | Bullets | Table | Code | Picture


def section(title: str, *blocks: Block) -> list[Block]:
    """The blocks below a title; nothing where there are none, or none but empty ones."""
    filled = [block for block in blocks if not _is_empty(block)]
    return [Heading(title), *filled] if filled else []


def to_markdown(blocks: Iterable[Block]) -> str:
    """The document in Markdown, as GitHub and MLflow show it."""
    parts = [_markdown(block) for block in blocks if not isinstance(block, Picture) and not _is_empty(block)]
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Iterable[Block], title: str) -> str:
    """The document as one page that asks for nothing outside itself; with a picture it holds plotly, 5 MB."""
    parts, has_plotly = [], False
    for block in blocks:
        if isinstance(block, Picture):
            parts.append(block.draw(not has_plotly))
            has_plotly = True
        elif not _is_empty(block):
            parts.append(_html(block))
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def _is_empty(block: Block) -> bool:
    match block:
        case Paragraph(text) | Code(text):
            return not text
        case Bullets(items):
            return not items
        case Table(_, rows):
            return not rows
    return False


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_without_tags(text)}"
        case Paragraph(text):
            return _without_tags(text)
        case Bullets(items):
            return "\n".join(f"- {_without_tags(item)}" for item in items)
        case Table(head, rows):
            return _markdown_table([head, ("---",) * len(head), *rows])
        case Code(text, language):
            return f"```{language}\n{text}\n```"
    raise TypeError(f"{type(block).__name__} is no block of text")


def _markdown_table(lines: Sequence[Sequence[str]]) -> str:
    # A cell is one line, and a bar would end it.
    cells = [[" ".join(_without_tags(cell).replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _without_tags(text: str) -> str:
    """The text with no HTML in it, which Markdown would let through; code shows all as it is."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Table(head, rows):
            first = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
            lines = ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in rows]
            body = "\n".join(f"<tr>{line}</tr>" for line in lines)
            return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        case Code(text, _):
            return f"<pre>{html.escape(text)}</pre>"
    raise TypeError(f"{type(block).__name__} is no block of text")


def _inline(text: str) -> str:
    """Escaped text, its bold and code marked."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escaped)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d7dee6 }
h1 + p { font-size: 1.1rem; background: #fdf3e7; border-left: 4px solid #e3720b; padding: .6rem .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e6ebf0; vertical-align: top }
th { font-weight: 600; color: #53616f } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto }
code { background: #f4f6f8; padding: 0 .2rem } @media print { .wide, pre { overflow: visible } }
"""

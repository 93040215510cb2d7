"""The look of a report: sections filled into one HTML page that holds its pictures and needs no network."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megacm3.evaluation.pictures import png_bytes
from megacm3.files import new_file


@dataclass(frozen=True)
class Figure:
    """A picture with a few lines under it."""

    picture: np.ndarray
    """uint8 [s, s, 3]"""
    lines: Sequence[str] = ()
    mark: str = ""
    """"" for none, "good" or "bad": the colour of the frame."""

    @property
    def source(self) -> str:
        """A data URL."""
        return "data:image/png;base64," + base64.b64encode(png_bytes(self.picture)).decode()


@dataclass
class Section:
    """One part of the page; what is empty is left out."""

    title: str
    text: str = ""
    groups: list[tuple[str, list[Figure]]] = field(default_factory=list)
    """Rows of figures, each with a heading (may be empty)."""
    side: int = 112
    """Width of a figure in CSS pixels."""
    charts: list[str] = field(default_factory=list)
    """SVG"""
    table: tuple[list[str], list[list[str]]] | None = None
    """Heads and rows."""
    fragments: list[str] = field(default_factory=list)
    """HTML, put on the page as it is: whoever makes it escapes what users wrote."""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --good: #2da44e; --bad: #cf222e; --back: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 40px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 14px; margin: 14px 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 10px; color: var(--soft); max-width: 78ch; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px; min-width: 130px; }
.card b { display: block; font-size: 24px; line-height: 1.2; }
.card span { color: var(--soft); font-size: 13px; }
.row { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
figure img { width: 100%; display: block; border: 1px solid var(--line); border-radius: 4px; }
figure.good img { border: 2px solid var(--good); } figure.bad img { border: 2px solid var(--bad); }
figcaption div + div { color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 12px; } .charts svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 14px; } th { text-align: left; color: var(--soft); font-weight: 600; }
td, th { padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; } pre { font-size: 12px; overflow: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<div class="cards">{% for value, label in cards %}
<div class="card"><b>{{ value }}</b><span>{{ label }}</span></div>{% endfor %}
</div>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.charts %}<div class="charts">
{% for chart in section.charts %}<div>{{ chart | safe }}</div>{% endfor %}
</div>{% endif %}
{% for heading, figures in section.groups %}
{% if heading %}<h3>{{ heading }}</h3>{% endif %}
<div class="row">{% for figure in figures %}
<figure style="width: {{ section.side }}px"{% if figure.mark %} class="{{ figure.mark }}"{% endif %}>
<img src="{{ figure.source }}" alt="{{ figure.lines[0] if figure.lines else '' }}">
<figcaption>{% for line in figure.lines %}<div>{{ line }}</div>{% endfor %}</figcaption></figure>{% endfor %}
</div>
{% endfor %}
{% if section.table %}<table>
<tr>{% for head in section.table[0] %}<th>{{ head }}</th>{% endfor %}</tr>{% for row in section.table[1] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}
{% for fragment in section.fragments %}
{{ fragment | safe }}
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


def render(title: str, lead: str, cards: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page; every text is escaped, since captions come from users."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(_PAGE)
    return template.render(title=title, lead=lead, cards=cards, sections=sections)


def write_page(
    path: str | Path, title: str, lead: str, cards: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> None:
    """`render` to a file."""
    with new_file(path) as temporary:
        temporary.write_text(render(title, lead, cards, sections), encoding="utf-8")

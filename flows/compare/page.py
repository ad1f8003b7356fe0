"""A comparison as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from flows.compare import heat
from flows.compare.cells import Section, runs_table, sections
from flows.compare.compare import Comparison
from flows.compare.curves import AXES, Curve
from flows.compare.svg import Line, plot, style

STYLE = (
    """
:root { color-scheme: light dark; --text: #1d2328; --quiet: #5b6670; --page: #ffffff; --rule: #d9dfe4;
  --c0: #1f6fb4; --c1: #c4501b; --c2: #2a8a4a; --c3: #8a4fae; --c4: #a07a00; --c5: #0f8a8a;
  --c6: #b8336a; --c7: #6b6b6b }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8eb; --quiet: #9aa5ae; --page: #15191d; --rule: #323a41;
  --c0: #64b0ee; --c1: #f08a55; --c2: #6cc98a; --c3: #c393e0; --c4: #d8b23c; --c5: #5cc8c8;
  --c6: #ee82ae; --c7: #b0b0b0 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.warning { border-left: 4px solid var(--c1); padding: .2rem 1rem }
.verdict { border-left: 4px solid var(--c0); padding: .2rem 1rem; margin: 1rem 0 }
.verdict dt { font-weight: 600 } .verdict dd { margin: 0 0 .6rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--rule); vertical-align: top }
th { color: var(--quiet); font-weight: 500 } .n { text-align: right; font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem }
figure { margin: 0 } figcaption, .quiet { color: var(--quiet); font-size: .9rem }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: var(--quiet) }
.grid { stroke: var(--rule); stroke-width: 1 } .line { fill: none; stroke-width: 1.6 } .dashed { stroke-dasharray: 5 3 }
.key { display: inline-block; width: 1.4em; border-top: 3px solid; vertical-align: middle; margin: 0 .4em 0 .8em }
"""
    + heat.STYLE
    + "".join(
        f".c{place} {{ stroke: var(--c{place}); border-color: var(--c{place}) }} " for place in range(8)
    )
)


def page(comparison: Comparison) -> str:
    """The whole page."""
    verdict = comparison.verdict
    title = f"Compare {comparison.title}"
    body = [
        f"<h1>{escape(title)}</h1>",
        '<dl class="verdict">',
        f"<dt>The models</dt><dd>{escape(verdict.about_models)}</dd>",
        f"<dt>The recipes</dt><dd>{escape(verdict.about_recipes)}</dd>",
        f"<dt>The budget</dt><dd>{escape(comparison.budget)}</dd></dl>" if comparison.budget else "</dl>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in comparison.warnings),
        table(runs_table(comparison), links(comparison)),
        *plots(comparison),
        *(table(section) for section in sections(comparison)),
        *where(comparison),
        '<p class="quiet">Differences are to the first run. Fewer bits per byte are better. Models are compared with '
        "each other by a paired bootstrap over the held-out documents, recipes by Welch's test over seeds and "
        "documents; on sets likewise, by accuracy with McNemar's test over items; by Holm's method where there are "
        "several: docs/compare.md.</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def where(comparison: Comparison) -> list[str]:
    """Where one of two is better; nothing where that is not asked."""
    parts = [f'<p class="quiet">{escape(heat.DESCRIBED)} {heat.KEY}</p>'] if comparison.where else []
    if comparison.is_where_left_out:
        parts.append(f'<p class="quiet">{escape(heat.OF_TWO)}</p>')
    for one in comparison.where:
        names = comparison.subjects[0].label, comparison.subjects[1].label
        parts += [table(section) for section in heat.tables(one, names)]
        parts += heat.html(one, names)
    return parts


def table(section: Section, addresses: Sequence[str] = ()) -> str:
    """A section; a row's name leads to its address."""
    heading = f"<h2>{escape(section.heading)}</h2>"
    if not section.rows:
        return f"{heading}<p>{escape(section.empty)}</p>"
    rows = [cells("th", section.header, section.fixed)]
    for place, row in enumerate(section.rows):
        rows.append(cells("td", row, section.fixed, addresses[place] if addresses else ""))
    return f'{heading}<div class="wide"><table>{"".join(rows)}</table></div>'


def cells(tag: str, row: Iterable[str], fixed: int, address: str = "") -> str:
    written = []
    for place, text in enumerate(row):
        shown = escape(text)
        if address and place == 1:
            shown = f'<a href="{escape(address)}">{shown}</a>'
        number = ' class="n"' if place >= fixed else ""
        written.append(f"<{tag}{number}>{shown}</{tag}>")
    return f"<tr>{''.join(written)}</tr>"


def links(comparison: Comparison) -> list[str]:
    return [one.run.url if one.run else "" for one in comparison.subjects]


def plots(comparison: Comparison) -> list[str]:
    """Training's and held-out loss, over each axis; nothing where one of the models was not trained here."""
    if not comparison.curves:
        return []
    names = [f"{one.label} {one.name}" for one in comparison.subjects]
    key = "".join(
        f'<span class="key {style(place)}"></span>{escape(name)}' for place, name in enumerate(names)
    )
    parts = []
    for what, curves in (
        ("training loss, nats a token", [one.training for one in comparison.curves]),
        ("held out, bits per byte", [one.held_out for one in comparison.curves]),
    ):
        for axis in AXES:
            drawing = plot([line(*one, axis) for one in zip(names, curves, strict=True)], axis, what)
            parts.append(f"<figure><figcaption>{what}</figcaption>{drawing}</figure>")
    return ["<h2>On the way</h2>", f"<p>{key}</p>", f'<div class="plots">{"".join(parts)}</div>']


def line(name: str, curve: Curve, axis: str) -> Line:
    return Line(name, getattr(curve, axis).tolist(), curve.values.tolist())

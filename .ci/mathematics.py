"""Formulas become MathML when the site is built, which browsers draw by themselves. A hook of MkDocs.

`$...$` is a formula in a line, and `$$...$$` a line of its own. No script and no font is loaded.
"""

from latex2mathml.converter import convert
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor


def on_config(config):
    """Called by MkDocs."""
    config.markdown_extensions.append(Mathematics())
    return config


class Formula(InlineProcessor):
    """Parsed with the text of a paragraph; code is taken out before."""

    def __init__(self, pattern: str, display: str, md):
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, m, data):
        text = convert(m[1].strip(), display=self.display).replace(
            ' xmlns="http://www.w3.org/1998/Math/MathML"', ""
        )
        return self.md.htmlStash.store(text), m.start(0), m.end(0)


class Mathematics(Extension):
    """Before backslashes are taken for escapes (priority 180), after code (190)."""

    def extendMarkdown(self, md):
        md.inlinePatterns.register(Formula(r"\$\$(.+?)\$\$", "block", md), "display-formula", 186)
        md.inlinePatterns.register(
            Formula(r"\$(?=\S)([^$]+?)(?<=\S)\$", "inline", md), "formula", 185
        )

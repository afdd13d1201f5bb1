"""How docstrings become pages: an extension of griffe, which reads them for mkdocstrings.

The source is written to be read as text. Markdown would run its labeled lines together, and griffe
knows neither the fields of an `equinox.Module` nor prose behind a list of errors. So, once a package
has been read:

    class with fields      gets the `__init__` that its fields make, inherited ones first
    `Example:`             is griffe's `Examples:`, hence code and no quotation
    `a, b: text`           in a list of arguments is one entry for each
    prose in a section     that is no entry of it goes behind it
    `Reference:` section   is a labeled line, as in a module
    `Cost:       text`     a label and text from column 12 on: an entry of a list
    arXiv:..., doi:...     are links
"""

import itertools
import re
from collections.abc import Iterator

import griffe

COLUMN = 12
SECTIONS = {"Args:", "Returns:", "Raises:"}
ENTRY = re.compile(r"^    (?P<names>\*{0,2}[\w.]+(?:, [\w.]+)*): ")
LABEL = re.compile(r"^[A-Z][\w ]*:?$")
ABSTRACT = re.compile(r".*\bAbstract(Class)?Var\b")
LINKS = {
    r"arXiv:(\d{4}\.\d{4,5})": r"[arXiv:\1](https://arxiv.org/abs/\1)",
    r"doi:(10\.\S+\w)": r"[doi:\1](https://doi.org/\1)",
}


class Docstrings(griffe.Extension):
    """Applied to every module, class and function of a package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Called by griffe when all of `pkg` has been read."""
        things = list(everything(pkg))
        classes = [thing for thing in things if isinstance(thing, griffe.Class)]
        for owner in [owner for owner in classes if "__init__" not in owner.all_members]:
            add_init(owner)
        for thing in things:
            if thing.docstring:
                thing.docstring.value = rewritten(thing.docstring.value)


def everything(thing: griffe.Object) -> Iterator[griffe.Object]:
    """`thing` and what is defined in it."""
    yield thing
    for member in list(thing.members.values()):
        if not member.is_alias:
            yield from everything(member)


def add_init(owner: griffe.Class) -> None:
    """The `__init__` of a class whose fields are its arguments."""
    fields = {}
    for parent in [*reversed(owner.mro()), owner]:
        for name, member in parent.members.items():
            if member.is_attribute and (field := field_of(member)):
                fields[name] = field
    found = sorted(fields.values(), key=lambda x: x.kind.name == "keyword_only")
    if found:
        itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        parameters = griffe.Parameters(itself, *found)
        owner.set_member("__init__", griffe.Function("__init__", parameters=parameters))


def field_of(attribute: griffe.Attribute) -> griffe.Parameter | None:
    """The argument that a field makes; None for what is no field."""
    if attribute.annotation is None or ABSTRACT.match(str(attribute.annotation)):
        return None
    # A property is none; griffe takes away the ClassVar of a constant, and calls it that.
    if "instance-attribute" not in attribute.labels or "property" in attribute.labels:
        return None
    value = attribute.value
    options = {}
    if isinstance(value, griffe.ExprCall) and value.function.canonical_path == "equinox.field":
        options = {option.name: option.value for option in value.arguments}
        value = options.get("default")
    keyword = str(options.get("kw_only")) == "True"
    return griffe.Parameter(
        attribute.name,
        annotation=attribute.annotation,
        kind=griffe.ParameterKind["keyword_only" if keyword else "positional_or_keyword"],
        default=value,
    )


def rewritten(text: str) -> str:
    """A docstring as griffe and Markdown understand it."""
    lines = text.splitlines()
    lines = ["Examples:" if line == "Example:" else line for line in lines]
    return "\n".join(labeled(split_names(freed(sources(lines)))))


def sources(lines: list[str]) -> Iterator[str]:
    """A section `Reference:` as a labeled line, as modules have it."""
    label = ""
    for line in lines:
        if line == "Reference:":
            label = "Reference:  "
            continue
        if label and not line:
            label = ""
        yield label + line.strip() if label else line
        if label:
            label = " " * COLUMN


def freed(lines: Iterator[str]) -> Iterator[str]:
    """Without the indentation of a paragraph that is no entry of the section it stands in."""
    section, before, free = False, "", False
    for line in lines:
        if line and not line.startswith(" "):
            section = line in SECTIONS
        if not before or not line:
            free = section and line.startswith("    ") and not ENTRY.match(line)
        yield line[4:] if free else line
        before = line


def split_names(lines: Iterator[str]) -> Iterator[str]:
    """`a, b: text` as `a: text` and `b: text`."""
    section = False
    for entry in entries(lines):
        if entry[0] and not entry[0].startswith(" "):
            section = entry[0] in SECTIONS
        match = ENTRY.match(entry[0])
        for name in match["names"].split(", ") if section and match else [None]:
            yield f"    {name}: {entry[0][match.end() :]}" if name else entry[0]
            yield from entry[1:]


def entries(lines: Iterator[str]) -> Iterator[list[str]]:
    """Each line with the more deeply indented ones behind it."""
    entry = []
    for line in lines:
        if entry and not line.startswith(" " * 8):
            yield entry
            entry = []
        entry.append(line)
    if entry:
        yield entry


def labeled(lines: Iterator[str]) -> Iterator[str]:
    """Paragraphs of labeled lines as lists."""
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        yield from paragraph if blank or not label_of(paragraph[0]) else items(paragraph)


def label_of(line: str) -> str | None:
    """`Cost:` of `Cost:       text`, if the text begins in its column."""
    label, text = line[:COLUMN].rstrip(), line[COLUMN:]
    starts = line[COLUMN - 2 : COLUMN] == "  " and text[:1].strip()
    return label if starts and LABEL.match(label) else None


def items(paragraph: list[str]) -> Iterator[str]:
    """One entry of a list for each label; a source that follows a source begins a line of its own."""
    before = ""
    for line in paragraph:
        label = label_of(line)
        text = line[COLUMN:] if label else line.strip()
        linked = text
        for pattern, link in LINKS.items():
            linked = re.sub(pattern, link, linked)
        if label:
            yield f"- **{label.rstrip(':')}:** {linked}"
        else:
            yield f"  {'<br>' if re.search(r'(arXiv|doi):[^ ]+$', before) else ''}{linked}"
        before = text

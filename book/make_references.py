"""Write book/references.md from book/references.bib (`--check`: only say whether it is in step).

One entry a line, under the headings of the bibliography, each behind an anchor that carries its key, so that a
notebook can link `../book/references.md#key`.
"""

import re
import sys
from pathlib import Path

from pybtex.backends.markdown import Backend
from pybtex.database import BibliographyData, Entry, parse_string
from pybtex.richtext import Text
from pybtex.style.formatting.plain import Style
from pybtex.style.template import field, sentence

BOOK = Path(__file__).resolve().parent
HEADING = re.compile(r"^% -{8} (.+) -{8}$", re.MULTILINE)

INTRODUCTION = """# References

<!-- Written by book/make_references.py from book/references.bib: change that file. -->

Ordered by theme. The line under each work says what the course uses it for. Authors, title, year and venue of each
entry were compared with a public source; where that was not possible, the entry says so.
"""


class Markdown(Backend):
    """pybtex's Markdown, with only those characters escaped that need it."""

    def format_str(self, text: str) -> str:
        return re.sub(r"([\\`*_\[\]<>])", r"\\\1", text)


class TitleAsWritten(Style):
    """The plain style, which would write MNIST in lower case, with titles left as they are."""

    def format_title(self, e, which_field, as_sentence=True):
        return sentence[field(which_field)] if as_sentence else field(which_field)


def prepared(entry: Entry) -> Entry:
    """The entry without our own notes, and without a link address that its doi or eprint repeats."""
    fields = {name: value for name, value in entry.fields.items() if name not in ("note", "annote", "month")}
    address = fields.get("url", "")
    if any(fields.get(name, "\0") in address for name in ("doi", "eprint")):
        fields.pop("url")
    if fields.get("howpublished", "").endswith(fields.get("year", "\0")):
        fields.pop("year")
    clean = Entry(entry.type, fields=fields, persons=entry.persons)
    clean.key = entry.key
    return clean


def rendered(key: str, entry: Entry) -> str:
    style, backend = TitleAsWritten(), Markdown()
    database = BibliographyData({key: prepared(entry)})
    text = next(iter(style.format_entries(database.entries.values()))).text.render(backend)
    text = re.sub(r"URL: \[.*?\]\((\S+)\)", r"[online](\1)", text)
    use = Text.from_latex(entry.fields.get("annote", "")).render(backend)
    doubt = " *(not compared with a public source)*" if entry.fields.get("note") != "verified" else ""
    return f'<a id="{key}"></a>{text}{doubt}\\\n<span class="use">{use}</span>\n'


def page() -> str:
    source = (BOOK / "references.bib").read_text(encoding="utf-8")
    parts = HEADING.split(source)[1:]
    blocks = [INTRODUCTION]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        entries = parse_string(body, "bibtex").entries
        order = sorted(entries, key=lambda k: (re.sub(r"\d.*", "", k), entries[k].fields.get("year", ""), k))
        blocks.append(f"## {title}\n\n" + "\n".join(rendered(k, entries[k]) for k in order))
    return "\n".join(blocks)


def main() -> int:
    target = BOOK / "references.md"
    text = page()
    if "--check" in sys.argv[1:]:
        return 0 if target.read_text(encoding="utf-8") == text else 1
    target.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

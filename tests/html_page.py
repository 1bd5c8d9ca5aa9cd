"""A reader of the pages that stages write."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path


@dataclass
class Element:
    """A tag of a page: all text inside it, and the elements inside it, outer before inner."""

    tag: str
    attributes: dict[str, str]
    text: str = ""
    inside: list["Element"] = field(default_factory=list)

    def find(self, tag: str, class_: str = "") -> list["Element"]:
        """The elements inside of a tag, and of a class where one is given."""
        return [
            e for e in self.inside if e.tag == tag and (not class_ or class_ in e.attributes.get("class", "").split())
        ]


class _Reader(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page", {})]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> Element:
        element = Element(tag, {name: value or "" for name, value in attrs})
        for outer in self.open:
            outer.inside.append(element)
        return element

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for outer in self.open:
            outer.text += data


def read_page(path: str | Path) -> Element:
    """The page as elements. Fails where tags do not nest."""
    reader = _Reader()
    reader.feed(Path(path).read_text(encoding="utf-8"))
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def section(page: Element, name: str) -> Element:
    """A section of the page by its id."""
    return next(e for e in page.find("section") if e.attributes["id"] == name)

"""Pages as tests read them: strictly, and by what stands in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

from secateur.reporting.page.records import Records
from secateur.reporting.page.render import render_page

VOID = {"meta", "link", "br", "hr", "img", "input"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    inside: list[Node] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str) -> list[Node]:
        return [n for inner in self.inside for n in ([inner] if inner.tag == tag else []) + inner.all(tag)]

    @property
    def words(self) -> str:
        return " ".join((self.text + " " + " ".join(inner.words for inner in self.inside)).split())

    def __getitem__(self, name: str) -> str:
        return self.attributes[name] or ""


class Tree(HTMLParser):
    """A strict reader: every element is closed where it belongs."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("document", {})]
        self.feed(page)
        self.close()
        assert [node.tag for node in self.open] == ["document"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        node = Node(tag, dict(attrs))
        self.open[-1].inside.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Node(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def page_of(records: Records) -> Node:
    return Tree(render_page(records)).open[0]


def table(page: Node, caption: str) -> list[list[str]]:
    """The cells of the one table whose caption begins so: numbers as they were recorded, the rest as shown."""
    [found] = [t for t in page.all("table") if t.all("caption")[0].words.startswith(caption)]
    rows = []
    for line in found.all("tbody")[0].all("tr"):
        cells = [cell for cell in line.inside if cell.tag in ("th", "td")]
        rows.append([cell.all("data")[0]["value"] if cell.all("data") else cell.words for cell in cells])
    return rows


def cards(page: Node) -> dict[str, str]:
    [group] = [node for node in page.all("dl") if node.attributes.get("class") == "cards"]
    return {card.all("dt")[0].words: " | ".join(dd.words for dd in card.all("dd")) for card in group.all("div")}

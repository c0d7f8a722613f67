"""A page of a text's gates, read back."""

from html.parser import HTMLParser


class Spans(HTMLParser):
    """Texts of the page's spans, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, dict]] = []
        self.inside: dict | None = None

    def handle_starttag(self, tag, attrs):
        if tag == "span":
            self.inside = dict(attrs)
            self.spans.append(("", self.inside))

    def handle_endtag(self, tag):
        self.inside = None if tag == "span" else self.inside

    def handle_data(self, data):
        if self.inside is not None:
            self.spans[-1] = (self.spans[-1][0] + data, self.inside)

"""Parts of a page that a command writes, between two markers."""

from pathlib import Path


class GeneratedPart:
    """What stands between the markers of a command: `start` SOURCE --> … `end`.

    name: what the page's author calls it, in the last marker.
    """

    def __init__(self, command: str, name: str) -> None:
        self.start = f"<!-- made by: {command} "
        self.end = f"\n<!-- end of {name} -->"

    def source(self, page: str) -> str:
        """From which file the page's part was made."""
        return page.partition(self.start)[2].partition(" -->")[0]

    def put(self, page: str, source: Path, text: str) -> str:
        """The page with `text`, made from a committed result; ValueError without the markers."""
        before, start, rest = page.partition(self.start)
        _, end, after = rest.partition(self.end)
        if not (start and end):
            raise ValueError(
                f"the page has no place for the table: {self.start}… and {self.end.strip()}"
            )
        return f"{before}{start}benchmarks/results/{source.name} -->\n{text}{end}{after}"

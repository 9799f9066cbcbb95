"""Draws the manual's pictures: SVG files that follow the reader's light or dark mode.

python docs/pictures/draw.py
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

# Widest letters of common sans-serif fonts, in sizes of the font.
_WIDTH = 0.6
_STYLE = """
.card { fill: #ffffff; stroke: #d0d7de }
text { font-family: -apple-system, "Segoe UI", Roboto, "DejaVu Sans", Arial, sans-serif; fill: #1f2328 }
.mono { font-family: ui-monospace, Consolas, "DejaVu Sans Mono", monospace }
.soft { fill: #59636e }
.box { fill: #f6f8fa; stroke: #afb8c1 }
.edit { fill: #ffd8a8; stroke: #d9730d }
.second { fill: #a5d8ff; stroke: #1971c2 }
.line { stroke: #59636e; fill: none }
.head { fill: #59636e }
@media (prefers-color-scheme: dark) {
  .card { fill: #161b22; stroke: #3d444d }
  text { fill: #f0f6fc }
  .soft { fill: #9ba7b4 }
  .box { fill: #212830; stroke: #656c76 }
  .edit { fill: #7a3e00; stroke: #ffa94d }
  .second { fill: #0b4a7d; stroke: #74c0fc }
  .line { stroke: #9ba7b4 }
  .head { fill: #9ba7b4 }
}
"""


class Picture:
    """An SVG picture on a card; text that does not fit into its box raises an error."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, size: int = 13, anchor: str = "start", kind: str = "", room: float = 0
    ) -> None:
        """Words on the line `y`, in `room` pixels, by default as far as the edge of the picture."""
        left = {"start": self.width - x, "middle": 2 * min(x, self.width - x), "end": x}[anchor]
        needed = len(words) * size * _WIDTH
        if needed > (room or left - 8):
            raise ValueError(f"{words!r} needs {needed:.0f} pixels, there are {room or left - 8:.0f}.")
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, kind: str = "box", label: str = "", size: int = 12
    ) -> None:
        """A rounded box with a label in its middle."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{kind}"/>')
        if label:
            self.text(x + width / 2, y + height / 2 + size * 0.36, label, size, "middle", room=width - 4)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line along the points, with a head at its end."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="{path}" class="line" marker-end="url(#head)"/>')

    def svg(self) -> str:
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{_STYLE}</style>",
                f'<defs>{head}<path d="M0 0 L8 4 L0 8 z" class="head"/></marker></defs>',
                f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" class="card"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def tokens() -> Picture:
    """Which tokens are edited, at every layer."""
    picture = Picture(760, 300, "Which tokens positions='f3+l2' and 'c2' edit")
    prompt = ["How", "do", "I", "plant", "a", "tree", "?"]
    answer = ["Dig", "a", "hole", "."]
    left, step, cell, top = 110, 57, 49, 62
    edited = {0: "edit", 1: "edit", 2: "edit", 5: "edit", 6: "edit", 7: "second", 8: "second"}
    for row, layer in enumerate(("layer 3", "layer 2", "layer 1")):
        y = top + 46 * row
        picture.text(24, y + 21, layer, kind="soft")
        for column in range(len(prompt + answer)):
            picture.box(left + step * column, y, cell, 32, edited.get(column, "box"))
    y = top + 46 * 3
    for column, word in enumerate(prompt + answer):
        picture.text(left + step * column + cell / 2, y + 14, word, 13, "middle", "mono", room=step)
    picture.parts.append(
        f'<path d="M{left + step * len(prompt) - 4} 44 V{y + 24}" class="line" stroke-dasharray="4 4"/>'
    )
    picture.text(left + step * 3.5 - 4, 34, "prompt", 14, "middle")
    picture.text(left + step * 9 - 4, 34, "answer", 14, "middle")
    picture.box(110, 250, 22, 22, "edit")
    picture.text(140, 266, "f3+l2: first 3 and last 2 of the prompt")
    picture.box(470, 250, 22, 22, "second")
    picture.text(500, 266, "c2: first 2 of the answer")
    return picture


def walk() -> Picture:
    """One training pass through a model with edited blocks."""
    picture = Picture(760, 348, "One training pass")
    picture.text(24, 34, "model(input_ids, labels)", 14, kind="mono")
    picture.box(24, 54, 330, 56, "second")
    picture.text(40, 78, "The pass opens.", room=310)
    picture.text(40, 98, "Where does the prompt end? (labels)", room=310)
    blocks = [("block 1", 140), ("block 2", 204)]
    picture.arrow((80, 110), (80, 138))
    for name, y in blocks:
        picture.box(24, y, 112, 40, "box", name, 13)
        picture.arrow((136, y + 20), (190, y + 20))
        picture.box(192, y, 226, 40, "edit")
        picture.text(204, y + 25, "h + Rᵀ(W h + b - R h)", 13, kind="mono", room=210)
        picture.text(434, y + 17, "hook: gathers the chosen tokens,", kind="soft", room=318)
        picture.text(434, y + 35, "edits them, adds them back", kind="soft", room=318)
    picture.arrow((192, 168), (164, 168), (164, 192), (80, 192), (80, 202))
    picture.arrow((192, 232), (164, 232), (164, 256), (80, 256), (80, 266))
    picture.box(24, 268, 112, 40, "box", "head, loss", 13)
    picture.arrow((136, 288), (190, 288))
    picture.box(192, 268, 226, 40, "second")
    picture.text(204, 293, "The pass closes.", room=210)
    picture.text(434, 285, "nothing of it is left", kind="soft", room=318)
    picture.text(434, 303, "on the model", kind="soft", room=318)
    picture.arrow((354, 82), (428, 82))
    picture.text(434, 78, "positions -> tokens, once", kind="soft", room=318)
    picture.text(434, 96, "for all layers", kind="soft", room=318)
    return picture


def cache() -> Picture:
    """What adapters share of a prompt's cache in vLLM."""
    picture = Picture(760, 316, "Adapters that share the blocks of a prompt's cache")
    picture.text(180, 34, "blocks of a prompt's cache", 14)
    picture.text(600, 34, "answer", 14)
    rows = [
        ("base model", ["shared"] * 6, "box"),
        ("completion (1)", ["shared"] * 6, "edit"),
        ("completion (2)", ["shared"] * 6, "second"),
        ("l7", ["shared"] * 5 + ["own"], "box"),
        ("all", ["own"] * 6, "edit"),
    ]
    for row, (name, blocks, answer) in enumerate(rows):
        y = 52 + 42 * row
        picture.text(24, y + 21, name, kind="mono", room=150)
        for column, kind in enumerate(blocks):
            picture.box(180 + 66 * column, y, 58, 30, "box" if kind == "shared" else "edit", kind, 12)
        picture.box(600, y, 130, 30, answer)
    picture.text(24, 284, "One copy of each shared block serves every row: no token in it is edited.", 13, kind="soft")
    picture.text(24, 303, "Colored: edited, so each adapter has its own.", 13, kind="soft")
    return picture


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    return {"tokens.svg": tokens().svg(), "pass.svg": walk().svg(), "cache.svg": cache().svg()}


if __name__ == "__main__":
    for name, svg in pictures().items():
        (Path(__file__).parent / name).write_text(svg, encoding="utf-8")

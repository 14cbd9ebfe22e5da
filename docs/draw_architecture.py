"""Draw the architecture: writes `architecture-light.svg` and `architecture-dark.svg` beside this file.

python docs/draw_architecture.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 800, 440
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Left edges and widths of the four columns.
COLUMNS = ((24, 156), (212, 176), (420, 164), (616, 160))
SUMMARY = (
    "Built once: a checkpoint and an adapter are traced on the meta device, lowered (native, folded, plugin or operator) and "
    "written as an engine of linked weights and a small adapter file. Run: the editor or the server turns an image, "
    "instructions and strengths into alpha and token_mask, inputs of the engine, which a backend executes at every step."
)


@dataclass(frozen=True)
class Theme:
    """Colours of one of the two files."""

    name: str
    band: str
    box: str
    edge: str
    ink: str
    soft: str
    accent: str
    tint: str


THEMES = (
    Theme("light", "#f4f6f9", "#ffffff", "#c5ccd6", "#1b2430", "#566273", "#0f5e9c", "#e3effa"),
    Theme("dark", "#161b22", "#0d1117", "#3a434f", "#e6edf3", "#9aa7b5", "#7cc0f5", "#14304a"),
)


class Drawing:
    """Shapes in one theme, in the order in which they are drawn."""

    def __init__(self, theme: Theme) -> None:
        self.theme = theme
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: float = 12, colour: str = "", weight: int = 400, mono: bool = False
    ) -> None:
        """Write words centred at x, on the baseline y."""
        family = MONO if mono else SANS
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-family="{family}" font-size="{size:g}" '
            f'font-weight="{weight}" fill="{colour or self.theme.ink}">{escape(words)}</text>'
        )

    def rectangle(self, x: float, y: float, width: float, height: float, *, fill: str, edge: str = "none", r: int = 8) -> None:
        """Draw a rectangle with round corners."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{r:g}" fill="{fill}" stroke="{edge}"/>'
        )

    def band(self, y: float, height: float, title: str, rest: str) -> None:
        """Draw the background of a phase, with its title."""
        self.rectangle(8, y, WIDTH - 16, height, fill=self.theme.band, r=12)
        self.parts.append(
            f'<text x="24" y="{y + 25:g}" font-family="{SANS}" font-size="13" fill="{self.theme.soft}">'
            f'<tspan font-weight="700" fill="{self.theme.accent}">{escape(title)}</tspan> {escape(rest)}</text>'
        )

    def box(self, column: int, y: float, height: float, title: str, lines: Sequence[str] = ()) -> None:
        """Draw a box across a column: a title, and lines below it."""
        x, width = COLUMNS[column]
        self.rectangle(x, y, width, height, fill=self.theme.box, edge=self.theme.edge)
        self.text(x + width / 2, y + 23, title, size=13, weight=700)
        for index, line in enumerate(lines):
            self.text(x + width / 2, y + 43 + 18 * index, line, colour=self.theme.soft)

    def chips(self, column: int, y: float, rows: Sequence[Sequence[str]], *, mono: bool = False) -> None:
        """Draw names on a tint, in rows of equal widths across a column."""
        left, whole = COLUMNS[column]
        for row, names in enumerate(rows):
            width = (whole - 24 - 8 * (len(names) - 1)) / len(names)
            for index, name in enumerate(names):
                x, top = left + 12 + index * (width + 8), y + 30 * row
                self.rectangle(x, top, width, 24, fill=self.theme.tint, r=6)
                self.text(
                    x + width / 2, top + 16.5, name, size=11 if mono else 11.5, colour=self.theme.accent, weight=600, mono=mono
                )

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw a line through the points, with a head at the last."""
        path = " L".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="{self.theme.soft}" stroke-width="1.5" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """Return the whole file."""
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="{self.theme.soft}"/></marker>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
                'role="img" aria-labelledby="title summary">',
                '<title id="title">Architecture of slideredit-rt</title>',
                f'<desc id="summary">{escape(SUMMARY)}</desc>',
                f"<defs>{head}</defs>",
                *self.parts,
                "</svg>\n",
            ]
        )


def draw(theme: Theme) -> str:
    """Return the architecture as SVG."""
    art = Drawing(theme)
    right = [x + width for x, width in COLUMNS]
    left = [x for x, _ in COLUMNS]

    art.band(8, 200, "Build once", "the trace reads no weights and needs no GPU")
    art.box(0, 48, 66, "Checkpoint", ["diffusers, safetensors"])
    art.box(0, 126, 66, "Adapter", ["ST, GST or a bank"])
    art.box(1, 72, 96, "Trace", ["on the meta device;", "one node for each", "adapted projection"])
    art.box(2, 48, 144, "Lowering", ["how a node is compiled"])
    art.chips(2, 116, [["native", "folded"], ["plugin", "operator"]])
    art.box(3, 48, 144, "Engine", ["graph or compiled plan", "base weights, linked", "adapter, a small file", "manifest.json"])
    art.arrow((right[0], 81), (left[1] - 16, 81), (left[1] - 16, 108), (left[1], 108))
    art.arrow((right[0], 159), (left[1] - 16, 159), (left[1] - 16, 132), (left[1], 132))
    art.arrow((right[1], 120), (left[2], 120))
    art.arrow((right[2], 120), (left[3], 120))

    art.band(220, 212, "Run", "every slider is an input: nothing is rebuilt or merged")
    art.box(0, 260, 66, "Request", ["image, sliders, seed"])
    art.box(0, 350, 66, "Edits", ["images and sweeps"])
    art.box(1, 260, 156, "SliderEditor, server", ["encode once, cached", "batch at every step", "mix sliders and images"])
    art.chips(1, 350, [["Python", "CLI"], ["HTTP", "Ray"]])
    art.box(2, 260, 100, "Runtime inputs")
    art.chips(2, 294, [["alpha [B, K]"], ["token_mask [B, K, S]"]], mono=True)
    art.text(left[2] + COLUMNS[2][1] / 2, 386, "prediction, every step", colour=theme.soft)
    art.box(3, 260, 156, "Backend")
    art.chips(3, 294, [["ONNX Runtime"], ["TensorRT"], ["TensorRT-RTX"], ["Inductor"]])
    art.arrow((right[0], 293), (left[1], 293))
    art.arrow((left[1], 383), (right[0], 383))
    art.arrow((right[1], 310), (left[2], 310))
    art.arrow((right[2], 310), (left[3], 310))
    art.arrow((left[3], 396), (right[1], 396))
    art.arrow((left[3] + COLUMNS[3][1] / 2, 192), (left[3] + COLUMNS[3][1] / 2, 260))
    return art.svg()


def main() -> None:
    """Write both files."""
    for theme in THEMES:
        Path(__file__).with_name(f"architecture-{theme.name}.svg").write_text(draw(theme))


if __name__ == "__main__":
    main()

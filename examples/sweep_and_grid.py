"""Draw a strip of one slider over its range, and a grid of two sliders at every pair of strengths.

    python examples/sweep_and_grid.py

Builds `engine/` in the current folder, unless it is there, and writes `strip.png` and `grid.png`.
"""

from pathlib import Path

from PIL import Image

from slideredit_rt import Slider, SliderEditor
from slideredit_rt.export.build import build_engine
from slideredit_rt.images import draw_grid

ENGINE = Path("engine")
PORTRAIT = Path(__file__).parents[1] / "docs" / "portrait.png"
STRENGTHS = [0.0, 0.5, 1.0, 1.5]


def main() -> None:
    """Sweep one slider, then two."""
    if not ENGINE.exists():
        build_engine("portraits-kontext", "portraits-st", ENGINE)
    editor = SliderEditor.from_engine(ENGINE)
    image = Image.open(PORTRAIT)
    sliders = [Slider("make the hair red"), Slider("make the person smile")]
    labels = [f"{strength:g}" for strength in STRENGTHS]

    # Slider 0 moves, slider 1 stays at its strength of 1. All images come from the same noise.
    strip = editor.sweep(image, sliders, 0, STRENGTHS)
    draw_grid([strip], labels, [""], sliders[0].instruction).save("strip.png")

    grid = editor.grid(image, sliders, rows=(0, STRENGTHS), columns=(1, STRENGTHS))
    draw_grid(grid, labels, labels, "rows: hair, columns: smile").save("grid.png")
    print(f"wrote strip.png ({len(strip)} images) and grid.png ({len(grid) * len(grid[0])} images)")


if __name__ == "__main__":
    main()

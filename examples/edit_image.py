"""Edit an image at a strength per instruction, then move the sliders without encoding or building anything again.

    python examples/edit_image.py

Builds `engine/` in the current folder, unless it is there, and writes `edited.png` and `suppressed.png`.
"""

from pathlib import Path

from PIL import Image

from slideredit_rt import Slider, SliderEditor
from slideredit_rt.export.build import build_engine

ENGINE = Path("engine")
PORTRAIT = Path(__file__).parents[1] / "docs" / "portrait.png"


def main() -> None:
    """Edit the sample portrait."""
    if not ENGINE.exists():
        # A diffusers folder or a hub repository, and an adapter file, work in place of the embedded ones.
        build_engine("portraits-kontext", "portraits-st", ENGINE)
    editor = SliderEditor.from_engine(ENGINE)
    image = Image.open(PORTRAIT)

    # Strength 0 suppresses an instruction, 1 is the base model's own edit.
    sliders = [Slider("make the hair red", 0.5), Slider("make the person smile", 1.0)]
    editor.edit(image, sliders, seed=0).save("edited.png")

    # Encoded once; every list of strengths is one more row of a batch.
    prepared = editor.prepare(image, sliders, seed=0)
    print(f"prompt: {prepared.prompt!r}, text rows of each slider: {prepared.spans}")
    suppressed, _exaggerated = editor.render(prepared, [[0.0, 1.0], [1.5, 1.0]])
    suppressed.save("suppressed.png")
    print("wrote edited.png and suppressed.png")


if __name__ == "__main__":
    main()

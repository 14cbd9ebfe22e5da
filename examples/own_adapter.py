"""Bring an adapter of your own: inspect a LoRA file, build an engine from it, and edit.

    python examples/own_adapter.py

Writes `my-lora/`, a diffusers LoRA folder made from an embedded adapter in place of yours, then `my-engine/` and `own.png`.
"""

from pathlib import Path

from PIL import Image

from slideredit_rt import Slider, SliderEditor
from slideredit_rt.adapters import load_adapter, match_adapter, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import family_of

BASE = "portraits-kontext"
PORTRAIT = Path(__file__).parents[1] / "docs" / "portrait.png"


def main() -> None:
    """Load, match, build, edit."""
    mine = Path("my-lora")
    if not mine.exists():
        save_adapter(load_adapter("portraits-st"), mine, "diffusers")

    # diffusers, PEFT, kohya, ComfyUI, XLabs and the authors' own layout are told apart by their keys.
    base = resolve_base(BASE)
    family = family_of(base)
    adapter = load_adapter(mine, family)
    print(f"{adapter.kind} adapter, rank {adapter.rank}, {len(adapter.pairs)} linears")

    # Compared with the base before anything is built; no weights are read.
    found = match_adapter(adapter, family, meta_transformer(base / "transformer"))
    print(f"matched {len(found.matched)}, missing {len(found.missing)}, unexpected {len(found.unexpected)}")

    engine = Path("my-engine")
    build_engine(BASE, adapter, engine, overwrite=True, progress=False)
    editor = SliderEditor.from_engine(engine)
    editor.edit(Image.open(PORTRAIT), [Slider("make the hair red", 0.6)]).save("own.png")
    print("wrote own.png")


if __name__ == "__main__":
    main()

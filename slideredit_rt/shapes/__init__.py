"""The shapes world: synthetic scenes, exact measurement of their edits, and training recipes.

`world` and `measurer` need only torch and Pillow. `sweeps` needs an editor, and the recipes need `slideredit_rt.training`.
"""

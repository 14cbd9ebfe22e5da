"""The shapes world, one module for each job: drawing, exact reading, measuring sliders, and the recipes trained on it.

`world` and `measurer` need torch and Pillow alone. `sweeps` needs an editor, the recipes need `slideredit_rt.training`.
"""

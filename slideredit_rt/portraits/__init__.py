"""The portraits world: drawings of people whose correct edits are known, and the exact reading of edited images.

`person` names the parameters of a person and draws people at random, `drawing` renders them, `world` holds the instructions and
the examples, and `measurer` reads edited images. They need only torch and Pillow.
"""

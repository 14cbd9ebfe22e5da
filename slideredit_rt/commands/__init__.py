"""Commands of `slideredit-rt`, one module per group. `slideredit_rt.cli` assembles them."""

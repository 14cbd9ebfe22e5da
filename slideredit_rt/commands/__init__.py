"""The commands of `slideredit-rt`, one module per group; `slideredit_rt.cli` puts them together."""

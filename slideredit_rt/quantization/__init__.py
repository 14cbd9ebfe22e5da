"""Quantised backbones: number formats, linears that compute with them, calibration, and writing and loading of bases."""

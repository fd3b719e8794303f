"""Weights that come with swd, the embedded teacher and its judge: the package ``swd.assets``."""

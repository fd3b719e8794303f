"""Hydra configuration, importable as the package ``swd.conf`` (``pkg://swd.conf``)."""

"""`python -m swd.cli` is the installed `swd` command; its code is in `swd.commands.cli`."""

from swd.commands.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()

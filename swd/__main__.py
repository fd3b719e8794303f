"""`python -m swd COMMAND ...` is the installed `swd` command."""

from swd.commands.cli import main

if __name__ == "__main__":
    main()

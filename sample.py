"""Draw pictures: `python sample.py prompts='[a red star above a blue ring]' seed=3`; `--help` lists everything."""

from swd.commands.cli import launch

if __name__ == "__main__":
    launch("sample")

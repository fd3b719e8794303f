"""Distil a model: `python train.py model=shapes loss=dmd_mmd`; `python train.py --help` lists everything."""

from swd.commands.cli import launch

if __name__ == "__main__":
    launch("train")

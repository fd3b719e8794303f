"""The commands, `swd COMMAND`: one module each, and what they share."""

import os

# Before anything imports torch: its C++ warnings tell in dozens of lines what a command reports in one.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

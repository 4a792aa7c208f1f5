"""Make features of images: the command; networks are in the room above, so the work is in training/embed.py."""

from __future__ import annotations

import sys
from importlib import import_module

if __name__ == "__main__":
    import_module("training.embed").main(sys.argv[1:])

"""``python -m oats``: the command line, for launchers that start a module, such as ``torchrun -m oats``."""

from oats.cli import main

if __name__ == "__main__":
    main()

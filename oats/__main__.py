"""``python -m oats`` is the command line, for launchers that start a module: ``torchrun -m oats compress
…``."""

from oats.cli import main

if __name__ == "__main__":
    main()

"""Train: ``python train.py model=alternet``."""

from vitscope.cli.train import main

if __name__ == "__main__":
    main()

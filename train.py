"""Train: ``python train.py model=alternet``."""

from vitscope.commands.train import main

if __name__ == "__main__":
    main()

"""``python -m vitscope train | analyze | report | doctor``."""

from vitscope.cli.main import main

if __name__ == "__main__":  # processes that draw figures import this file
    main()

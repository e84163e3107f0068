"""Report: ``python report.py``."""

from vitscope.commands.report import main

if __name__ == "__main__":
    main()

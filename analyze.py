"""Analyze: ``python analyze.py run=runs/<id>``."""

from vitscope.cli.analyze import main

if __name__ == "__main__":
    main()

"""Analyze: ``python analyze.py run=runs/<id>``."""

from vitscope.commands.analyze import main

if __name__ == "__main__":
    main()

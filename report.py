"""Report: ``python report.py``."""

if __name__ == "__main__":  # processes that draw figures import this file: they need nothing of it
    from vitscope.cli.report import main

    main()

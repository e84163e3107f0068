"""``python -m vitscope train | analyze | report | doctor``."""

from vitscope.commands import main

main()

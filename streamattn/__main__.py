"""`python -m streamattn` is `streamattn`."""

from streamattn.cli import main

main()

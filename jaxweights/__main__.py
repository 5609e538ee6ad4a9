"""`python -m jaxweights` is the command `jaxweights`."""

import sys

from jaxweights.command.main import main

if __name__ == "__main__":
    sys.exit(main())

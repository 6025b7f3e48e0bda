"""`python -m cora_plugin`: the command `cora-plugin`."""

import sys

from cora_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())

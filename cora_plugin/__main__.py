"""`python -m cora_plugin`, and what the command `cora-plugin` runs.

It imports nothing but what an interrupt while the rest is imported needs.
"""

import signal
import sys


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        from cora_plugin.cli import main as run

        code = run()
    except KeyboardInterrupt:
        print("cora-plugin: interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    # Nothing is left to be ended but the interpreter itself, which would complain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The command ``mezzotint``, and ``python -m mezzotint``."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C while it is still being imported is no traceback either."""
    try:
        from mezzotint.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

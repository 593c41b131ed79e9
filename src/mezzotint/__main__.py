"""The command ``mezzotint``, and ``python -m mezzotint``."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C while it, or what it needs, is still being imported is no traceback either."""
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from mezzotint.cli import main as run

        run()
    except KeyboardInterrupt:
        _stop()
    except Exception:
        if not interrupted:
            raise
        _stop()  # a package swallowed it while it was imported, and was then left half imported


def _stop() -> None:
    sys.stderr.write("stopped\n")
    sys.exit(130)


if __name__ == "__main__":
    main()

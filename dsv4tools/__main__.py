"""``python -m dsv4tools``, and the command ``dsv4tools``."""

import signal


def start() -> None:
    """Run the command line. Ctrl-C while its modules load ends it silently, as any program; later `main` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:   # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dsv4tools.cli import main  # noqa: PLC0415  - loading it is what may be interrupted

    main()


if __name__ == "__main__":
    start()

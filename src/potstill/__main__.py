"""The program `potstill`: where Python starts the command line."""

from potstill.boundary import boundary


def main() -> None:
    """The command: guarded before anything else is imported, which can take seconds."""
    with boundary():
        from potstill.cli import run

        run()


if __name__ == "__main__":
    main()

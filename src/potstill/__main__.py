"""The program `potstill`: where Python starts the command line."""

from potstill.console.boundary import boundary


def main() -> None:
    """The command: guarded before anything else is imported, which can take seconds."""
    with boundary():
        from potstill.cli.app import run

        run()


if __name__ == "__main__":
    main()

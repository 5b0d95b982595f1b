"""The command `fcvit`, also as `python -m fcvit`."""

import sys


def main() -> int:
    """Run the command line of this process. Ctrl-C ends it in order also while its modules are imported."""
    try:
        from fcvit import cli

        return cli.main()
    except KeyboardInterrupt:
        print("fcvit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

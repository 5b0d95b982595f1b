"""Entry point of the command `fcvit` and of `python -m fcvit`."""

import sys


def main() -> int:
    """Run the command line of this process. Handle Ctrl-C also while modules are being imported."""
    try:
        from fcvit import cli

        return cli.main()
    except KeyboardInterrupt:
        print("fcvit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

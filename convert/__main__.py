"""Entry point of `python -m convert`: says plainly that this version does not have it."""

import sys


def main() -> int:
    """Report on stderr; exit code 2, as for every request that cannot be met."""
    sys.stderr.write("exl: `convert` is not part of this version yet; CHANGELOG.md says what is\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())

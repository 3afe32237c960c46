"""`python -m exl_runtime` is `exl`."""

from .cli.main import entry

if __name__ == "__main__":
    entry()

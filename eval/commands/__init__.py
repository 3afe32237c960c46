"""One file per command: `HELP`, `USAGE`, `add(parser)` and `run(args, progress) -> Outcome`.

Nothing heavy is imported at the top of these files: `--help` must be instant.
"""

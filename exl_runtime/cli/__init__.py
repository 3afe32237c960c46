"""The `exl` command: one small file per command, everything heavy imported when a command runs."""

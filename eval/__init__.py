"""`python -m eval`: not in this version; see CHANGELOG.md."""

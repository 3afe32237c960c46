"""`python -m convert`: not in this version; see CHANGELOG.md."""

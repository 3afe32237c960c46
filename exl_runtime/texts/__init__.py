"""Text out of files, for calibration and evaluation. Everything streams. Knows no models and no torch.

`documents.py` running text out of txt, jsonl, json and parquet     `records.py` the texts inside files of records
`tokens.py`    the ids of such text
"""

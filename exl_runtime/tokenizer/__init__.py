"""Text and token ids: tokenizer.py; ids to text as they come: detokenizer.py; messages to text: template.py."""

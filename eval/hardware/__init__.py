"""Everything that only a card can tell, by one command: stages in processes of their own, and the table of targets.

stages.py   what is run, in which order           running.py  one stage: a process, its figures kept in a file
targets.py  figures of the stages into rows       report.py   the rows as Markdown and JSON
"""

"""The whole algorithm in one process (`loop`), and files to copy: each says how to run it."""

"""What Python callers use: embed one file, search a dataset."""

"""The output folder: schemas, plans, the commit protocol, and every check when rows are read back."""

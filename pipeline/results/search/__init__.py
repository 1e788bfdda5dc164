"""Nearest rows: the query, conditions on columns, exact search, and an index."""

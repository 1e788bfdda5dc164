"""What is made from the rows of a dataset. Reads the dataset and nothing else: no network, no Ray, no command line.

newest.py    the rows of a job that still hold, read with every check
reading.py   what reading needs: a local file of an object, and damage told by its key
columns.py   one schema for the users' own columns of all plans
parts.py     rows -> large Parquet files of bounded size
snapshot.py  a clean, verified copy: for takedown, compaction and sharing
"""

"""What is made from the rows of a dataset. Reads the dataset and nothing else: no network, no Ray, no command line.

newest.py    the rows of a job that still hold, read with every check
reading.py   what reading needs: a local file of an object, and damage told by its key
columns.py   one schema for the users' own columns of all plans
parts.py     rows -> large Parquet files of bounded size
classes.py   names of the classes; the likeliest of a row
labels.py    what people say is in the videos
evaluate.py  hit rates of the stored scores against labels
probing.py   accuracy of a linear SVM on the stored vectors
where.py     conditions on columns
query.py     what is asked: vectors, and the seconds that each is of
search.py    the rows nearest to some vectors, exactly
index.py     the same by an index beside the dataset
indexing.py  makes that index, or adds to it
sample.py    a uniform sample of rows that come by once
dedup.py     near-duplicate videos
times.py     when and where each shard was computed
report/      what a job did, for people, in one HTML file
page/        a local page over all of it
snapshot.py  a clean, verified copy: for takedown, compaction and sharing
"""

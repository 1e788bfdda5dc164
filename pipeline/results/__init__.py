"""What is made from the rows of a dataset. Reads only the dataset; imports no neural network, no Ray, no command line.

search/        nearest rows, exactly or by an index
evaluation/    hit rates of the stored scores and accuracy of a linear SVM, against labels
duplicates.py  near-duplicate videos
sample.py      a uniform sample of a stream of rows
report/        what a job did, in one HTML file
page/          a local web page to search and play the videos
"""

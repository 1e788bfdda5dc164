"""Evaluation against labels: hit rates of scores, accuracy of an SVM on vectors; labels and class names."""

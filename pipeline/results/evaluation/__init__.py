"""How good the vectors are: hit rates of scores, an SVM on vectors, labels and class names."""

"""Objects on S3: the store, its client, bodies that resume, errors in words, parallel listings."""

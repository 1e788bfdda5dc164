"""S3: the store, its clients, resumable downloads, error messages, retries and parallel listings."""

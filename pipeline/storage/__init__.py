"""Object storage: one interface (`store`), implemented by a local folder (`local`) and by S3 (`s3/`)."""

"""Where objects are kept: one interface (`store`), a local folder (`local`) and S3 (`s3/`)."""

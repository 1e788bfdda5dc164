"""The progress of a job, read only from its output: status, timeline, report."""

"""The progress of a job as read from its output alone: status, timeline, report."""

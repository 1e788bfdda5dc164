"""Find the videos of a source: folders, lists and buckets become rows of a plan, each with its identity."""

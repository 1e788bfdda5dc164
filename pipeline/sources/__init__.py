"""Which videos there are: folders, lists and buckets become rows of a plan, each with its identity."""

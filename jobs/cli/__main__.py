"""`python -m jobs.cli`: the command line where the console script is not installed, as on a cluster's head."""

from jobs.cli import main

main()

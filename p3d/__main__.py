"""`python -m p3d`: the command line where the console script is not installed, as on the head of a cluster."""

from p3d.jobs.cli import main

main()

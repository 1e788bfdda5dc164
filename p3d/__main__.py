"""`python -m p3d`: the command line where the console script is not installed, such as on a cluster's head node."""

from p3d.jobs.cli import main

main()

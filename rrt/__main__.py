"""`python -m rrt COMMAND` is the console script `rrt COMMAND`."""

from rrt.cli.main import main

main()

"""`python -m rrt.train` is `rrt train`, for launchers."""

import sys

from rrt.cli import main

if __name__ == '__main__':
  main.run('train', sys.argv[1:])

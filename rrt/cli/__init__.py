"""The commands of `rrt`, one file each, and the pictures that they draw."""

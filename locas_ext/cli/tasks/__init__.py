"""The work of the commands that only the command line has."""

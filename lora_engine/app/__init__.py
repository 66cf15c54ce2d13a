"""The command line: configuration, a run from data to report, what is printed."""

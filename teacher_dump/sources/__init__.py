"""Sources: files and data sets of every kind that rows are read from."""

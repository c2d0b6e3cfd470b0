"""What a cache holds, in memory: sparse rows, records of samples and parts. Pure data; uses the errors alone."""

"""The work of one process: scoring parts or answering questions, its log, its progress. Uses signals."""

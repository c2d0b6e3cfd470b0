"""One process's work: a teacher that scores parts or answers questions, its log, its progress. Uses signals."""

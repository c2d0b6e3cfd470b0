"""The page of an experiment: its report with samples and matrices. Uses reporting and inspection."""
